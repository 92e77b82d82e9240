"""Reading and writing a config: TOML, overrides by dotted name, and one line for every mistake.

A mistake is answered with its file and line or its override, the field, what is wrong and what would be right.
"""

import difflib
import re
import tomllib
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from shared.atomic_files import replacing
from shared.config import SECRET, TABLES, Config, instead_of_flag
from shared.errors import UsageError


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read the TOML file, apply `table.field=value` overrides (TOML values; a bare word is text), check everything.

    Raises `UsageError` with one line: file, line, field, what is wrong and what would be right.
    """
    try:
        source = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except OSError as error:
        raise UsageError(f"{path}: cannot read the config ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8 text") from None
    try:
        values = tomllib.loads(source)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from None
    for override in overrides or []:
        _apply_override(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems: dict[tuple[int | str, ...], list[Any]] = {}
        for problem in error.errors():
            problems.setdefault(problem["loc"][:2], []).append(problem)
        lines = [_explain(found, path, source, overrides or []) for found in problems.values()]
        raise UsageError(SECRET.sub("***", "\n".join(lines))) from None


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config; loading the file gives an equal `Config`."""
    with replacing(path) as pending:
        pending.write_text(dump_config(config), encoding="utf-8")


def dump_config(config: Config) -> str:
    """Return the resolved config as TOML; unset (None) fields are left out."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _apply_override(values: dict[str, Any], override: str) -> None:
    name, separator, raw = override.partition("=")
    parts = name.strip().split(".")
    if not separator or len(parts) != 2 or not all(parts):
        shown = SECRET.sub("***", override)
        raise UsageError(f"override {shown!r}: write it as table.field=value, such as train.lora_rank=64")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    table = values.setdefault(parts[0], {})
    if not isinstance(table, dict):
        raise UsageError(f"override {SECRET.sub('***', override)!r}: {parts[0]} is not a table")
    table[parts[1]] = value


def _explain(problems: list[Any], path: Path, source: str, overrides: list[str]) -> str:
    """One line for the first of a field's problems; where the field may be this or that, for all it may be."""
    problem = problems[0]
    alternatives = [isinstance(part, str) for part in problem["loc"][2:3]] == [True]
    location = [str(part) for part in problem["loc"][: 2 if alternatives else None]]
    name = ".".join(location[:2])
    blamed = _blamed(problem, location, overrides)
    given = f"override{'s' if len(blamed) > 1 else ''} {', '.join(map(repr, blamed))}"
    where = given if blamed else f"{path}{_line_of(source, location)}"
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown {'table' if len(location) == 1 else 'key'} {name}{_nearest(location)}"
    if problem["type"] == "missing":
        return f"{where}: {name} is missing"
    messages = [each["msg"].removeprefix("Value error, ") for each in (problems if alternatives else [problem])]
    messages = [
        message.replace("a valid tuple", 'a list such as ["a", "b"], quoted for the shell') for message in messages
    ]
    message = " or ".join(messages).replace("Input should be", "should be").replace(" or should be", ", or")
    shown = "" if len(location) == 1 else f" = {problem['input']!r}"
    return f"{where}: {'.'.join(location)}{shown}: {message}"


def _blamed(problem: Any, location: list[str], overrides: list[str]) -> list[str]:
    """Return the overrides that set the field; of a table, those of the fields that the message names."""
    last = {text.partition("=")[0].strip(): text for text in overrides}
    fields = [".".join(location[:2])]
    if len(location) == 1 and problem["type"] == "extra_forbidden":
        fields = [field for field in last if field.startswith(f"{location[0]}.")]
    elif len(location) == 1:
        fields = [f"{location[0]}.{word}" for word in re.findall(r"\w+", problem["msg"])]
    return [text for field, text in last.items() if field in fields]


def _line_of(source: str, location: list[str]) -> str:
    """ ":12" for the line that sets the field, its table's line if it is absent, or nothing."""
    table, table_line = "", ""
    for number, line in enumerate(source.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([\w-]+)\s*\]", line):
            table = header[1]
            if table == location[0]:
                table_line = f":{number}"
        elif len(location) > 1 and table == location[0] and re.match(rf"\s*{re.escape(location[1])}\s*=", line):
            return f":{number}"
    return table_line


def _nearest(location: list[str]) -> str:
    if instead := instead_of_flag(location[-1]):
        return f"; {instead}"
    if len(location) == 1:
        names = list(TABLES)
    else:
        names = [f"{location[0]}.{field}" for field in TABLES[location[0]].model_fields]
        everywhere = [f"{name}.{field}" for name, table in TABLES.items() for field in table.model_fields]
        names += [name for name in everywhere if name.endswith(f".{location[1]}")]
    close = difflib.get_close_matches(".".join(location[:2]), names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(names)}"

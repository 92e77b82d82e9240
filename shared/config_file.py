"""Read and write config files: TOML, overrides by dotted name, and one line for every mistake.

The line names the file and line or the override, the field, what is wrong and what would be right.
"""

import difflib
import re
import tomllib
from itertools import groupby
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from shared.atomic_files import replacing
from shared.config import INSTEAD_OF_FLAG, TABLES, Config
from shared.errors import UsageError
from shared.redaction import SECRET
from shared.run_folder import adapter_rank


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read the TOML file, apply `table.field=value` overrides (TOML values; a bare word is text), check everything.

    Raises `UsageError` with one line for each wrong field.
    """
    try:
        source = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
        values = tomllib.loads(source)
    except OSError as error:
        raise UsageError(f"{path}: cannot read the config ({error.strerror}); give the path of a TOML file") from None
    except ValueError as error:  # of TOML or UTF-8
        raise UsageError(f"{path}: not valid TOML: {error}") from None
    texts: dict[str, str] = {}
    for override in overrides or []:
        texts[_apply_override(values, override)] = override
    _take_rank(values)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        fields = groupby(error.errors(), key=lambda problem: problem["loc"][:2])
        lines = [_explain(list(problems), path, source, texts) for _, problems in fields]
        raise UsageError(SECRET.sub("***", "\n".join(lines))) from None


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config; loading the file gives an equal `Config`."""
    with replacing(path) as pending:
        pending.write_text(dump_config(config), encoding="utf-8")


def dump_config(config: Config) -> str:
    """Return the resolved config as TOML; unset (None) fields are left out."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _apply_override(values: dict[str, Any], override: str) -> str:
    """Set the field of an override in `values`; return its dotted name."""
    name, separator, raw = override.partition("=")
    table, _, field = (part.strip() for part in name.partition("."))
    shown = SECRET.sub("***", override)
    if not (separator and table and field) or "." in field:
        raise UsageError(f"override {shown!r}: write it as table.field=value, such as train.lora_rank=64")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    fields = values.setdefault(table, {})
    if not isinstance(fields, dict):
        raise UsageError(f"override {shown!r}: {table} is not a table")
    fields[field] = value
    return f"{table}.{field}"


def _take_rank(values: dict[str, Any]) -> None:
    """Replace train.lora_rank = "auto" by the rank of train.initial_adapter."""
    train = values.get("train")
    if isinstance(train, dict) and train.get("lora_rank") == "auto":
        if not (place := train.get("initial_adapter")):
            raise UsageError("train.lora_rank = 'auto': needs train.initial_adapter; set that, or a rank such as 64")
        train["lora_rank"] = adapter_rank(Path(str(place)).expanduser(), "train.initial_adapter")


def _explain(problems: list[Any], path: Path, source: str, overrides: dict[str, str]) -> str:
    """Return one line for the problems of a field: of the first, or of all types that a union allows."""
    first = problems[0]
    is_union = any(isinstance(part, str) for part in first["loc"][2:3])
    location = [str(part) for part in first["loc"][: 2 if is_union else None]]
    name = ".".join(location)
    table_problem, unknown = len(location) == 1, first["type"] == "extra_forbidden"
    if table_problem and unknown:
        blamed = [text for field, text in overrides.items() if field.startswith(f"{name}.")]
    else:
        words = [f"{name}.{word}" for word in re.findall(r"\w+", first["msg"])] if table_problem else []
        blamed = [text for field, text in overrides.items() if field in (".".join(location[:2]), *words)]
    where = f"{path}{_line_of(source, location)}"
    if blamed:
        where = f"override{'s' if len(blamed) > 1 else ''} {', '.join(map(repr, blamed))}"
    if unknown:
        return f"{where}: unknown {'table' if table_problem else 'key'} {name}; {_advice(location)}"
    if first["type"] == "missing":
        return f"{where}: {name} is missing"
    messages = [problem["msg"].removeprefix("Value error, ") for problem in (problems if is_union else [first])]
    message = " or ".join(messages).replace("a valid tuple", 'a list such as ["a", "b"], quoted for the shell')
    message = message.replace("Input should be", "should be").replace(" or should be", ", or")
    shown = "" if table_problem else f" = {first['input']!r}"
    return f"{where}: {name}{shown}: {message}"


def _line_of(source: str, location: list[str]) -> str:
    """Return ":12" for the line that sets the field, or its table's line; "" if neither is found."""
    table, found = "", ""
    for number, line in enumerate(source.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([\w-]+)\s*\]", line):
            table = header[1]
            found = f":{number}" if table == location[0] else found
        elif table == location[0] and location[1:] and re.match(rf"\s*{re.escape(location[1])}\s*=", line):
            return f":{number}"
    return found


def _advice(location: list[str]) -> str:
    """Return what to write instead of an unknown table or key."""
    if instead := INSTEAD_OF_FLAG.get(location[-1]):
        return instead
    names = list(TABLES)
    if len(location) > 1:
        fields = [(table, field) for table, kind in TABLES.items() for field in kind.model_fields]
        names = [f"{table}.{field}" for table, field in fields if table == location[0] or field == location[1]]
    close = difflib.get_close_matches(".".join(location), names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(names)}"

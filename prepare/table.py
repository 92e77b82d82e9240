"""The dataset table NAME.jsonl: one object per line, edited by people and by the commands of this package."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from shared.atomic_files import replacing
from shared.caption_lint import CaptionFinding, count_tokens, lint_captions, with_trigger
from shared.config import Config
from shared.errors import DataError, UsageError
from shared.model.pretrained import pretrained_folder
from shared.sources.root import DataRoot
from shared.sources.tables import json_object, read_text

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareReport:
    """The findings and files of one command; the object of its `--json`."""

    config: str
    table: str
    summary: dict[str, Any]
    """What is printed, by the words it is printed with."""
    files: dict[str, str] = field(default_factory=dict)
    """File or clip that was left out -> reason."""
    notes: list[str] = field(default_factory=list)
    findings: list[CaptionFinding] = field(default_factory=list)
    unfinished: int = 0
    """Clips that the same command may still do."""


def table_path(config: Config) -> Path:
    """Return the JSONL table of `data.dataset_name`. Raises `UsageError` for any other data set."""
    name = config.data.dataset_name or ""
    if Path(name).suffix.lower() != ".jsonl":
        raise UsageError(f"data.dataset_name: expected a .jsonl table, got {name!r}; make one with `precog init`")
    return Path(name)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of the table, in order. Raises `DataError` with the number of a row that is no object."""
    try:
        lines = read_text(path.resolve(), str(path)).split("\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); make it with `precog init`") from None
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json_object(line) if line.strip() else None
        except DataError as error:
            raise DataError(f"{path} row {number}: {error}; mend or delete the line") from None
        if row is not None:
            if not all(type(row.get(name)) in (int, float, NoneType) for name in ("start_seconds", "end_seconds")):
                raise DataError(f"{path} row {number}: start_seconds and end_seconds must be numbers")
            rows.append(row)
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    """Replace the table; a crash leaves the old one whole."""
    replace_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def replace_text(path: Path, text: str) -> None:
    """Write the whole file; a crash leaves the old one."""
    with replacing(path) as pending:
        pending.write_text(text, "utf-8")


def captions_of(row: Row, column: str = "text") -> list[str]:
    """Return the captions of a row that are not blank; stage 1 takes a text, a list, or {"text", "weight"}."""
    entries = row.get(column)
    texts = [e.get("text") if isinstance(e, dict) else e for e in (entries if isinstance(entries, list) else [entries])]
    return [text for text in texts if isinstance(text, str) and text.strip()]


def video_file(row: Row, config: Config) -> Path:
    """Return the row's video. Raises `DataError` for a name that leads out of the data root, or to no file."""
    data = config.data
    return DataRoot(data.instance_data_root.resolve(), data.follow_links).find(str(row.get(data.video_column)))


def clip_label(row: Row, config: Config) -> str:
    """Return the clip's name for messages, such as `a.mp4 from 3 s to 7.5 s`."""
    words = [("from", row.get("start_seconds")), ("to", row.get("end_seconds"))]
    return str(row.get(config.data.video_column)) + "".join(f" {w} {t:g} s" for w, t in words if t is not None)


def lint_rows(rows: list[Row], config: Config) -> list[CaptionFinding]:
    """Return what is weak in the captions as stage 1 encodes them; a row without one counts as an empty caption."""
    token, column = config.data.id_token, config.data.caption_column
    captions = [with_trigger(token, text) for row in rows for text in captions_of(row, column) or [""]]
    try:
        folder = pretrained_folder(config.model, "tokenizer", download=False)
    except UsageError:  # the model is not on this machine yet
        return lint_captions(captions, token, None)
    from transformers import AutoTokenizer

    return lint_captions(captions, token, count_tokens(AutoTokenizer.from_pretrained(folder), captions))

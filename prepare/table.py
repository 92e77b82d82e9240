"""The dataset table NAME.jsonl: one object per line, edited by people and by the commands of this package."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shared.atomic_files import replacing
from shared.caption_lint import CaptionFinding, count_tokens, lint_captions, with_trigger
from shared.config import Config
from shared.errors import DataError, UsageError
from shared.sources.root import DataRoot

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

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON has it."""
        return asdict(self)


def table_path(config: Config) -> Path:
    """Return the JSONL table of `data.dataset_name`. Raises `UsageError` for any other data set."""
    name = config.data.dataset_name or ""
    if Path(name).suffix.lower() != ".jsonl":
        raise UsageError(f"data.dataset_name: expected a .jsonl table, got {name!r}; make one with `precog init`")
    return Path(name)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of the table, in order. Raises `DataError` with the number of a row that is no object."""
    rows: list[Row] = []
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}); make it with `precog init`") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} row {number}: not JSON ({error}); mend or delete the line") from None
        window = [row.get(name) for name in ("start_seconds", "end_seconds")] if isinstance(row, dict) else [""]
        if not all(value is None or type(value) in (int, float) for value in window):
            raise DataError(f"{path} row {number}: expected an object, its start_seconds and end_seconds numbers")
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
    tokenizer = _local_tokenizer(config)
    return lint_captions(captions, token, count_tokens(tokenizer, captions) if tokenizer else None)


def _local_tokenizer(config: Config) -> Any | None:
    """Return the model's tokenizer if its files are on this machine, without asking the hub; else None."""
    from huggingface_hub import try_to_load_from_cache

    model = config.model
    folder = Path(model.pretrained_model_name_or_path, "tokenizer")
    if not folder.is_dir():
        file = try_to_load_from_cache(
            model.pretrained_model_name_or_path,
            "tokenizer/spiece.model",
            cache_dir=model.model_cache_dir,
            revision=model.revision,
        )
        if not isinstance(file, str):
            return None
        folder = Path(file).parent
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)

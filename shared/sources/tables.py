"""Tables of sources: CSV, JSONL, parquet and `datasets.load_dataset`, read into unchecked rows."""

import csv
import importlib.util
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shared.config import Data
from shared.errors import DataError, one_line
from shared.redaction import redacted
from shared.regular_files import open_regular

MAX_TEXT_FILE_BYTES = 1 << 30
MAX_CAPTION_BYTES = 16 * 1024
MAX_JSON_LINE_BYTES = 1 << 20
MAX_SHOWN_CHARACTERS = 200

VIDEO_NAMES = ("video", "file_name", "video_path", "path", "file", "mp4")
"""Columns that hold the video where data.video_column is the default; the first one counts."""
CAPTION_NAMES = ("text", "caption", "prompt", "captions")
OPTIONAL_COLUMNS = ("start_seconds", "end_seconds", "repeats", "loss_weight")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Row:
    """A row as read, nothing checked yet; `error` is the reason why a row cannot be read."""

    where: str
    """Its file and row, for messages."""
    video: object = None
    caption: object = None
    options: Mapping[str, object] = field(default_factory=dict)
    """Those of `OPTIONAL_COLUMNS` that are there."""
    error: str = ""


def csv_rows(table: Path, data: Data) -> Iterator[Row]:
    """Yield the rows of a CSV file, whose first line names the columns; raise `DataError` if it cannot be parsed."""
    file = escaped(table.name)
    # Strict, because the default takes the rest of the file for a field after a quote that is never closed.
    reader = csv.DictReader(io.StringIO(read_text(table, file), newline=""), strict=True)
    line = 1
    try:
        reader.fieldnames = [name.strip() for name in next(filter(None, reader.reader), [])]  # behind blank lines
        columns = _choose_columns(reader.fieldnames, data, file)
        line = reader.line_num + 1
        for values in reader:
            where, line = f"{file} line {reader.line_num}", reader.line_num + 1
            if None in values or None in values.values():
                yield Row(where, error=f"expected {len(reader.fieldnames)} fields as in the header")
            else:
                yield _row(values, columns, where)
    except csv.Error as error:
        reason = "a quote is opened and never closed" if "unexpected end" in str(error) else escaped(str(error))
        raise DataError(f"{file} line {line}: {reason}") from None


def jsonl_rows(table: Path, data: Data) -> Iterator[Row]:
    """Yield the rows of a file with one JSON object per line."""
    file = escaped(table.name)
    for number, line in enumerate(read_text(table, file).split("\n"), start=1):
        where = f"{file} row {number}"
        if line.strip():
            try:
                found = json_object(line)
                yield _row(found, _choose_columns(list(found), data, "the object"), where)
            except DataError as error:
                yield Row(where, error=str(error))


def json_object(line: str) -> dict[str, object]:
    """Parse a line of a JSONL table; raise `DataError` with the reason, without the line."""
    if len(line.encode()) > MAX_JSON_LINE_BYTES:
        raise DataError(f"the line has more than {MAX_JSON_LINE_BYTES:,} bytes")
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON at column {error.colno}: {escaped(error.msg)}") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, thousands of brackets
        raise DataError(f"not JSON: {escaped(str(error))}") from None
    if not isinstance(found, dict):
        raise DataError("not a JSON object")
    return found


def parquet_rows(table: Path, data: Data) -> Iterator[Row]:
    """Yield the rows of a parquet file; raise `DataError` if it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file, number = escaped(table.name), 0
    try:
        with open_regular(table) as opened, pq.ParquetFile(opened) as parquet:
            columns = _choose_columns(parquet.schema_arrow.names, data, file)
            # of embedded videos only a few are in memory
            rows = 1024 if parquet.schema_arrow.field(columns[1]).type in (pa.string(), pa.large_string()) else 4
            for batch in parquet.iter_batches(batch_size=rows, columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    yield _row(values, columns, f"{file} row {number}")
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        problem = escaped(one_line(error))
        raise DataError(f"{file} after row {number}: not a readable parquet file: {problem}") from error


def dataset_rows(name: str, data: Data) -> Iterator[Row]:
    """Yield the rows of `datasets.load_dataset`, which runs no code of the data set; raise `DataError`."""
    path = Path(name)
    folder = path.resolve() if path.is_dir() else None
    # The name of a reader, such as "csv", would read all such files in the working directory.
    is_reader = name.isidentifier() and importlib.util.find_spec(f"datasets.packaged_modules.{name}") is not None
    if folder is None and (path.exists() or not _HUB_NAME.fullmatch(name) or is_reader):
        raise DataError(
            f"dataset_name '{escaped(name)}': expected a .csv, .jsonl or .parquet file, a folder or a hub name"
        )
    import datasets
    from huggingface_hub import constants

    shown = escaped(folder.name if folder else name)
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(str(folder or name), data.dataset_config_name, split="train")
    except Exception as error:  # its readers raise the exceptions of many libraries; the cause says more
        cause = f": {escaped(' '.join(str(error.__cause__).split()))}" if error.__cause__ else ""
        raise DataError(
            f"dataset_name '{shown}': datasets.load_dataset fails: {escaped(one_line(error))}{cause}"
        ) from error
    columns = _choose_columns(rows.column_names, data, f"'{shown}'")
    feature = rows.features[columns[1]]
    if isinstance(feature, datasets.Audio):
        raise DataError(f"'{shown}': column '{escaped(columns[1])}' holds sound, not videos; set data.video_column")
    if isinstance(feature, datasets.Video | datasets.Image):  # their bytes or path, not decoded
        rows = rows.cast_column(columns[1], type(feature)(decode=False))
    places = [folder] if folder else []
    places += [Path(place).resolve() for place in (datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)]
    for number, row in enumerate(rows.select_columns(columns), start=1):
        video = row[columns[1]]
        named = video.get("path") if isinstance(video, dict) and video.get("bytes") is None else None
        if isinstance(named, str) and any(Path(named).resolve().is_relative_to(place) for place in places):
            row = row | {columns[1]: Path(named).resolve()}  # a file of the data set itself
        yield _row(row, columns, f"{shown} row {number}")


def _row(values: Mapping[str, object], columns: Sequence[str], where: str) -> Row:
    options = {name: values[name] for name in OPTIONAL_COLUMNS if name in values}
    return Row(where, values[columns[1]], values[columns[0]], options)


def _choose_columns(names: Sequence[str], data: Data, table: str) -> list[str]:
    """Return the columns to read: of captions, of videos, and the optional ones that are there.

    Raise `DataError` where a needed one is missing or ambiguous.
    """
    chosen = []
    fields = (("caption_column", data.caption_column, CAPTION_NAMES), ("video_column", data.video_column, VIDEO_NAMES))
    for setting, wanted, usual in fields:
        found = next((name for name in usual if name in names), wanted) if wanted == usual[0] else wanted
        if found not in names:
            raise DataError(f"{table} has no column '{escaped(wanted)}'; there are {listed(names)}; set data.{setting}")
        chosen.append(found)
    chosen += [name for name in OPTIONAL_COLUMNS if name in names]
    for name in chosen:
        if names.count(name) > 1:
            raise DataError(f"{table} has {names.count(name)} columns '{escaped(name)}'")
    return chosen


def read_text(path: Path, where: str) -> str:
    """Read a UTF-8 file without its byte order mark; raise `DataError` that names the line of bad UTF-8 or NUL."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > MAX_TEXT_FILE_BYTES:
            raise DataError(f"{where} has more than {MAX_TEXT_FILE_BYTES:,} bytes")
        content = file.read()
    place, reason = content.find(b"\0"), "a NUL character; save the file as UTF-8 text"
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        place, reason = 0, "UTF-16; save the file as UTF-8 text"
    if place < 0:
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            place, reason = error.start, "not UTF-8"
    line = content.count(b"\n", 0, place) + 1
    raise DataError(f"{where} line {line}: {reason}".strip())


def escaped(text: str) -> str:
    """Return `text` as one short printable line: control, bidi and other invisible characters as escapes."""
    text = redacted(text)
    shown = text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + "..."
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in shown)


def listed(names: Sequence[str]) -> str:
    """Return the first names in quotes, and the number of the rest."""
    shown = ", ".join(f"'{escaped(name)}'" for name in names[:12]) or "none"
    return shown + (f" and {len(names) - 12} more" if len(names) > 12 else "")

"""The tables of sources: CSV, JSONL, parquet and `datasets.load_dataset`, as rows that nothing has checked yet."""

import csv
import difflib
import importlib.util
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Never

from precompute.sources.paths import escaped
from shared.config import Data
from shared.errors import DataError

MAX_TEXT_FILE_BYTES = 1 << 30
MAX_JSON_LINE_BYTES = 1 << 20
MAX_JSON_DEPTH = 32
VIDEO_SUFFIXES = {".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
"""What a folder of videos is searched for; whether a file decodes is found out later."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Row:
    """A row as read, nothing checked yet."""

    video: object
    caption: object
    where: str
    start_seconds: object = None
    end_seconds: object = None


def csv_rows(table: Path, data: Data, problems: list[str]) -> Iterator[Row]:
    file = escaped(table.name)
    # Strict, because the default swallows the rest of the file after a quote that is never closed.
    reader = csv.reader(io.StringIO(read_text(table, file), newline=""), strict=True)
    header: list[str] | None = None
    number = 0
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise DataError(f"{file} row {number + 1} (line {line}): a quote is opened and never closed") from None
            raise DataError(f"{file} row {number + 1} (line {line}): {escaped(str(error))}") from None
        if fields is None:
            break
        number += 1
        if not fields:
            continue
        if header is None:
            header = [name.strip() for name in fields]
            _choose_columns(header, data, file)
            continue
        if len(fields) != len(header):
            problems.append(f"{file} row {number} (line {line}): {len(fields)} fields, the header has {len(header)}")
            continue
        row = dict(zip(header, fields, strict=True))
        start, end = (_csv_number(row.get(name)) for name in ("start_seconds", "end_seconds"))
        yield Row(row[data.video_column].strip(), row[data.caption_column], f"{file} row {number}", start, end)
    if header is None:
        raise DataError(f"{file} is empty; its first line names the columns")


def _csv_number(field: str | None) -> object:
    if field is None or not field.strip():
        return None
    try:
        return float(field)
    except ValueError:
        return field


def jsonl_rows(table: Path, data: Data, problems: list[str]) -> Iterator[Row]:
    file = escaped(table.name)
    for number, line in enumerate(read_text(table, file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file} row {number}"
        try:
            row = _parse_json_object(line)
            _choose_columns(list(row), data, "the object")
        except DataError as error:
            problems.append(f"{where}: {error}")
            continue
        start, end = row.get("start_seconds"), row.get("end_seconds")
        yield Row(row[data.video_column], row[data.caption_column], where, start, end)


def _parse_json_object(line: str) -> dict[str, object]:
    """One line of JSON, an object; numbers are finite, keys differ, size and depth are limited before the parse."""
    if len(line.encode()) > MAX_JSON_LINE_BYTES:
        raise DataError(f"the line has more than {MAX_JSON_LINE_BYTES:,} bytes")
    depth = 0
    if line.count("[") + line.count("{") > MAX_JSON_DEPTH:
        for bracket in re.findall(r"[\[\]{}]", _JSON_STRING.sub("", line)):
            depth += 1 if bracket in "[{" else -1
            if depth > MAX_JSON_DEPTH:
                raise DataError(f"nested deeper than {MAX_JSON_DEPTH}")
    try:
        value = json.loads(line, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON at column {error.colno}: {escaped(error.msg)}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise DataError(f"not JSON: {escaped(str(error))}") from None
    if not isinstance(value, dict):
        raise DataError("not a JSON object")
    return value


def _refuse_constant(name: str) -> Never:
    raise DataError(f"{name} is not a JSON number")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"field '{escaped(twice)}' is there twice")
    return values


def parquet_rows(table: Path, data: Data, problems: list[str]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = escaped(table.name)
    number = 0
    try:
        with pq.ParquetFile(table) as parquet:
            columns = _choose_columns(parquet.schema_arrow.names, data, file)
            for batch in parquet.iter_batches(batch_size=1024, columns=columns):
                for values in zip(*(batch.column(name) for name in columns), strict=True):
                    number += 1
                    where = f"{file} row {number}"
                    try:
                        row = {name: value.as_py() for name, value in zip(columns, values, strict=True)}
                    except UnicodeDecodeError:
                        problems.append(f"{where}: not UTF-8")
                        continue
                    yield _table_row(row, data, where)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} after row {number}: not a readable parquet file: {_first_line(error)}") from error


def dataset_rows(name: str, data: Data) -> Iterator[Row]:
    """Rows of `datasets.load_dataset`, which runs no code of the data set's (it has no such option any more)."""
    folder = Path(name).resolve() if name and Path(name).is_dir() else None
    if folder is not None:
        _refuse_video_folder(folder)
    elif Path(name).exists() or not _HUB_NAME.fullmatch(name) or _is_reader(name):
        raise DataError(
            f"dataset_name '{escaped(name)}' is no .csv, .jsonl or .parquet file, no folder and no hub name"
        )
    import datasets

    shown = escaped(folder.name if folder else name)
    datasets.disable_progress_bars()
    try:
        # An absolute folder, because a bare "csv" or "json" is the name of a reader first.
        rows = datasets.load_dataset(str(folder or name), data.dataset_config_name, split="train")
    except Exception as error:  # its readers raise whatever the libraries below them raise
        raise DataError(f"dataset_name '{shown}': datasets.load_dataset fails: {_why(error)}") from error
    columns = _choose_columns(rows.column_names, data, f"'{shown}'")
    feature = rows.features[data.video_column]
    if isinstance(feature, datasets.Video | datasets.Image | datasets.Audio):
        raise DataError(
            f"'{shown}': column '{escaped(data.video_column)}' holds {type(feature).__name__} data; it must hold paths "
            "relative to instance_data_root"
        )
    for number, row in enumerate(rows.select_columns(columns), start=1):
        yield _table_row(row, data, f"{shown} row {number}")


def _is_reader(name: str) -> bool:
    """Whether `datasets` has a reader of that name, which reads all such files in the working directory."""
    return name.isidentifier() and importlib.util.find_spec(f"datasets.packaged_modules.{name}") is not None


def _refuse_video_folder(folder: Path) -> None:
    """`datasets` takes a folder with videos for a VideoFolder, whatever table lies in it, and asks for `file_name`."""
    names = list(walk(folder, []))
    video = next((name for name in names if Path(name).suffix.lower() in VIDEO_SUFFIXES), None)
    if video is None:
        return
    tables = [name for name in names if Path(name).suffix.lower() in (".csv", ".jsonl", ".parquet")]
    hint = f"set dataset_name to the table, '{escaped(str(folder / tables[0]))}'" if tables else "name a table instead"
    raise DataError(
        f"dataset_name '{escaped(str(folder))}' is a folder that holds videos too ('{escaped(video)}'), which "
        f"`datasets` does not read by column names; {hint}"
    )


def _table_row(row: dict[str, Any], data: Data, where: str) -> Row:
    start, end = row.get("start_seconds"), row.get("end_seconds")
    return Row(row[data.video_column], row[data.caption_column], where, start, end)


def _choose_columns(names: Sequence[str], data: Data, table: str) -> list[str]:
    """The columns of `names` that are read; raises `DataError` where a wanted one is missing or ambiguous."""
    for wanted in (data.caption_column, data.video_column):
        if wanted not in names:
            nearest = sorted(names, key=lambda name: -difflib.SequenceMatcher(None, wanted, name).ratio())
            raise DataError(f"{table} has no column '{escaped(wanted)}'; there are {listed(nearest)}")
    chosen = {data.caption_column, data.video_column, "start_seconds", "end_seconds"}
    for name in chosen:
        if names.count(name) > 1:
            raise DataError(f"{table} has {names.count(name)} columns '{escaped(name)}'")
    return [name for name in names if name in chosen]


def walk(folder: Path, problems: list[str]) -> Iterator[str]:
    """Names of all files below `folder`, relative, with forward slashes, sorted; hidden ones are left out."""

    def fail(error: OSError) -> Never:
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            link = Path(parent, name)
            if link.is_symlink():
                problems.append(f"'{escaped(link.relative_to(folder).as_posix())}' is a link to a folder: not followed")
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(parent, name).relative_to(folder).as_posix()


def read_text(path: Path, where: str) -> str:
    """A UTF-8 file, byte order mark dropped; raises `DataError` that names the line of bad UTF-8 or NUL."""
    if path.stat().st_size > MAX_TEXT_FILE_BYTES:
        raise DataError(f"{where} has more than {MAX_TEXT_FILE_BYTES:,} bytes")
    content = path.read_bytes()
    nul = content.find(b"\0")
    if nul >= 0:
        raise DataError(f"{where} line {_line_of(content, nul)}: a NUL character; is this UTF-8 text?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} line {_line_of(content, error.start)}: not UTF-8") from None


def _line_of(content: bytes, position: int) -> int:
    return content.count(b"\n", 0, position) + 1


def listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{escaped(name)}'" for name in names[:12]) or "none"
    return shown + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _why(error: Exception) -> str:
    """In one line, with what lies below: `datasets` says no more than that generating failed."""
    below = error.__cause__
    return _first_line(error) + (f": {escaped(' '.join(str(below).split()))[:200]}" if below and str(below) else "")


def _first_line(error: Exception) -> str:
    return escaped(str(error).strip().split("\n")[0]) or type(error).__name__

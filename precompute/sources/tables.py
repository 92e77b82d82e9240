"""Tables of sources: CSV, JSONL, parquet and `datasets.load_dataset`, read into unchecked rows."""

import csv
import importlib.util
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Never

from precompute.sources.paths import escaped, expanded
from shared.config import Data
from shared.errors import DataError

MAX_TEXT_FILE_BYTES = 1 << 30
MAX_JSON_LINE_BYTES = 1 << 20
VIDEO_SUFFIXES = {".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
"""Suffixes of the files that count as videos in a folder; probing finds out which of them decode."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


class RowError(DataError):
    """A row that cannot be used; the message begins with its file and row."""

    def __init__(self, where: str, reason: object) -> None:
        super().__init__(f"{where}: {reason}")


@dataclass(frozen=True, slots=True)
class Row:
    """A row as read, nothing checked yet."""

    where: str
    """Its file and row, for messages."""
    video: object
    caption: object
    start_seconds: object = None
    end_seconds: object = None


def csv_rows(table: Path, data: Data) -> Iterator[Row | RowError]:
    """Yield the rows of a CSV file, whose first line names the columns; raise `DataError` if it cannot be parsed."""
    file = escaped(table.name)
    # Strict, because the default takes the rest of the file for a field after a quote that is never closed.
    reader = csv.reader(io.StringIO(read_text(table, file), newline=""), strict=True)
    header: list[str] = []
    number, line = 0, 1
    try:
        for number, fields in enumerate(reader, start=1):
            where, line = f"{file} row {number} (line {line})", reader.line_num + 1
            if fields and not header:
                header = [name.strip() for name in fields]
                _choose_columns(header, data, file)
            elif fields and len(fields) != len(header):
                yield RowError(where, f"expected {len(header)} fields as in the header, got {len(fields)}")
            elif fields:
                yield _row(dict(zip(header, fields, strict=True)), data, f"{file} row {number}")
    except csv.Error as error:
        reason = "a quote is opened and never closed" if "unexpected end" in str(error) else escaped(str(error))
        raise RowError(f"{file} row {number + 1} (line {line})", reason) from None
    if not header:
        raise DataError(f"{file} is empty; its first line must name the columns")


def jsonl_rows(table: Path, data: Data) -> Iterator[Row | RowError]:
    """Yield the rows of a file with one JSON object per line."""
    file = escaped(table.name)
    for number, line in enumerate(read_text(table, file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file} row {number}"
        try:
            if len(line.encode()) > MAX_JSON_LINE_BYTES:
                raise DataError(f"the line has more than {MAX_JSON_LINE_BYTES:,} bytes")
            row = json.loads(line)
            if not isinstance(row, dict):
                raise DataError("not a JSON object")
            _choose_columns(list(row), data, "the object")
            yield _row(row, data, where)
        except json.JSONDecodeError as error:
            yield RowError(where, f"not JSON at column {error.colno}: {escaped(error.msg)}")
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits, thousands of brackets
            yield RowError(where, f"not JSON: {escaped(str(error))}")
        except DataError as error:
            yield RowError(where, error)


def parquet_rows(table: Path, data: Data) -> Iterator[Row | RowError]:
    """Yield the rows of a parquet file; raise `DataError` if it cannot be read."""
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
                        yield RowError(where, "not UTF-8")
                    else:
                        yield _row(row, data, where)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise RowError(f"{file} after row {number}", f"not a readable parquet file: {_one_line(error)}") from error


def dataset_rows(name: str, data: Data) -> Iterator[Row]:
    """Yield the rows of `datasets.load_dataset`, which runs no code of the data set; raise `DataError`."""
    path = expanded(name)
    folder = path.resolve() if path.is_dir() else None
    if folder is None and (path.exists() or not _HUB_NAME.fullmatch(name) or _is_reader(name)):
        raise DataError(
            f"dataset_name '{escaped(name)}': expected a .csv, .jsonl or .parquet file, a folder or a hub name"
        )
    import datasets

    shown = escaped(folder.name if folder else name)
    datasets.disable_progress_bars()
    try:
        # An absolute folder, because a bare "csv" or "json" is the name of a reader first.
        rows = datasets.load_dataset(str(folder or name), data.dataset_config_name, split="train")
    except Exception as error:  # its readers raise the exceptions of many libraries; the cause says more
        cause = f": {escaped(' '.join(str(error.__cause__).split()))}" if error.__cause__ else ""
        raise DataError(f"dataset_name '{shown}': datasets.load_dataset fails: {_one_line(error)}{cause}") from error
    columns = _choose_columns(rows.column_names, data, f"'{shown}'")
    feature = rows.features[data.video_column]
    if isinstance(feature, datasets.Video | datasets.Image | datasets.Audio):
        raise DataError(
            f"'{shown}': column '{escaped(data.video_column)}' holds {type(feature).__name__} data; it must hold paths "
            "relative to instance_data_root"
        )
    for number, row in enumerate(rows.select_columns(columns), start=1):
        yield _row(row, data, f"{shown} row {number}")


def _is_reader(name: str) -> bool:
    """Return True for a reader of `datasets`, which would read all such files in the working directory."""
    return name.isidentifier() and importlib.util.find_spec(f"datasets.packaged_modules.{name}") is not None


def _row(values: Mapping[str, object], data: Data, where: str) -> Row:
    start, end = values.get("start_seconds"), values.get("end_seconds")
    return Row(where, values[data.video_column], values[data.caption_column], start, end)


def _choose_columns(names: Sequence[str], data: Data, table: str) -> list[str]:
    """Return the columns of `names` to read; raise `DataError` where a needed one is missing or ambiguous."""
    for needed in (data.caption_column, data.video_column):
        if needed not in names:
            raise DataError(f"{table} has no column '{escaped(needed)}'; there are {listed(names)}")
    chosen = {data.caption_column, data.video_column, "start_seconds", "end_seconds"}
    for name in chosen:
        if names.count(name) > 1:
            raise DataError(f"{table} has {names.count(name)} columns '{escaped(name)}'")
    return [name for name in names if name in chosen]


def find_files(folder: Path) -> tuple[list[str], list[str]]:
    """Return the files below `folder` and its links to folders, which are not followed; hidden ones are left out.

    Names are relative, with forward slashes, sorted by folder.
    """

    def fail(error: OSError) -> Never:
        raise error

    files: list[str] = []
    links: list[str] = []
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = {name: Path(parent, name) for name in [*folders, *sorted(names)] if not name.startswith(".")}
        links += [
            path.relative_to(folder).as_posix() for name, path in paths.items() if name in folders and path.is_symlink()
        ]
        files += [path.relative_to(folder).as_posix() for name, path in paths.items() if name not in folders]
    return files, links


def read_text(path: Path, where: str) -> str:
    """Read a UTF-8 file without its byte order mark; raise `DataError` that names the line of bad UTF-8 or NUL."""
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
    """Return the first names in quotes, and the number of the rest."""
    shown = ", ".join(f"'{escaped(name)}'" for name in names[:12]) or "none"
    return shown + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _one_line(error: Exception) -> str:
    return escaped(str(error).strip().split("\n")[0]) or type(error).__name__

"""Sources: the user's rows, each a video and its captions, out of four layouts, checked before anything is decoded.

- two text files in the data root, one caption and one video per line (the diffusers script's prompts.txt, videos.txt)
- a folder of x.mp4 + x.txt, at any depth; the whole text file is one caption, its lines joined by a space
- a .csv, .jsonl or .parquet table, by column names
- a folder or hub name for `datasets.load_dataset`, split "train", by column names

Tables may have `start_seconds` and `end_seconds`; where a value can be a list (all but CSV), a caption may be a list of
texts or of {"text", "weight"}. Captions lose white space at both ends. An empty caption must be explicit: a table's
empty text is one, a blank line or an empty text file is not. Rows count from 1; a CSV's header is row 1, as in a
spreadsheet, and a JSONL's row is its line.
"""

import csv
import difflib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Never

from precompute.paths import escaped, resolve_inside
from shared.config import Data
from shared.errors import DataError, UsageError

MAX_CAPTION_BYTES = 16 * 1024
MAX_TEXT_FILE_BYTES = 1 << 30
MAX_JSON_LINE_BYTES = 1 << 20
MAX_JSON_DEPTH = 32
MAX_SHOWN_PROBLEMS = 5
VIDEO_SUFFIXES = {".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
"""What a folder of videos is searched for; whether a file decodes is found out later."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Caption:
    """One text for a clip, `id_token` already in front, drawn in proportion to `weight`."""

    text: str
    weight: float


@dataclass(frozen=True, slots=True)
class Source:
    """One row of the user's data set; `captions` has at least one."""

    path: Path
    """Absolute and free of links: a regular file inside the data root."""
    name: str
    """Relative to the data root with forward slashes, for display and the view."""
    captions: tuple[Caption, ...]
    start_seconds: float | None
    end_seconds: float | None
    where: str
    """The row, for messages: "metadata.csv row 3"."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A row as read, nothing checked yet."""

    video: object
    caption: object
    where: str
    start_seconds: object = None
    end_seconds: object = None


def read_sources(data: Data) -> list[Source]:
    """Every row of the data set, in its order (a folder's by name).

    Raises `DataError` in one line: the first five problems, each with its file and row, and how many more there are.
    """
    root = data.instance_data_root.resolve()
    if not root.is_dir():
        raise DataError(f"instance_data_root '{escaped(str(data.instance_data_root))}' is not a folder")
    problems: list[str] = []
    sources: list[Source] = []
    try:
        for row in _read_rows(root, data, problems):
            try:
                sources.append(_check_row(row, root, data.id_token))
            except DataError as error:
                problems.append(f"{row.where}: {error}")
    except OSError as error:
        raise DataError(f"'{escaped(str(error.filename))}' cannot be read: {error.strerror}") from error
    if problems:
        more = len(problems) - MAX_SHOWN_PROBLEMS
        raise DataError("; ".join(problems[:MAX_SHOWN_PROBLEMS]) + (f"; and {more} more" if more > 0 else ""))
    if not sources:
        raise DataError(f"'{escaped(data.dataset_name or str(data.instance_data_root))}' has no rows")
    return sources


def _read_rows(root: Path, data: Data, problems: list[str]) -> Iterator[_Row]:
    """The rows of whichever layout `data` describes; rows that cannot be read go to `problems`."""
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    table = Path(data.dataset_name or "")
    read_table = readers.get(table.suffix.lower())
    if data.dataset_name is not None and (read_table is None or table.is_dir()):
        return _dataset_rows(data.dataset_name, data)
    if data.dataset_config_name is not None:
        raise UsageError("data.dataset_config_name is for `datasets.load_dataset`; leave it out for files")
    if read_table is not None:
        if not table.is_file():
            hint = f"; there is '{escaped(str(root / table))}'" if (root / table).is_file() else ""
            raise DataError(f"dataset_name '{escaped(str(table))}' is not a file{hint}")
        return read_table(table, data, problems)

    captions, videos = root / data.caption_column, root / data.video_column
    if captions.is_file() and videos.is_file():
        return _text_file_rows(root, data)
    for there, missing in ((captions, videos), (videos, captions)):
        if there.is_file():
            raise DataError(f"'{escaped(there.name)}' is in the data root, '{escaped(missing.name)}' is not")
    return _folder_rows(root, data, problems)


def _text_file_rows(root: Path, data: Data) -> Iterator[_Row]:
    columns = []
    for name in (data.caption_column, data.video_column):
        lines = re.split(r"\r\n|\r|\n", _read_text(resolve_inside(root, name), escaped(name)))
        columns.append([(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()])
    captions, videos = columns
    caption_file, video_file = escaped(data.caption_column), escaped(data.video_column)
    if len(captions) != len(videos):
        raise DataError(
            f"{caption_file} has {len(captions)} captions, {video_file} has {len(videos)} videos; "
            "each needs one line per clip"
        )
    for (caption_line, caption), (video_line, video) in zip(captions, videos, strict=True):
        yield _Row(video, caption, f"{video_file} line {video_line}, {caption_file} line {caption_line}")


def _folder_rows(root: Path, data: Data, problems: list[str]) -> Iterator[_Row]:
    videos: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    for name in _walk(root, problems):
        suffix = PurePosixPath(name).suffix
        stem = name.removesuffix(suffix)
        if suffix.lower() in VIDEO_SUFFIXES:
            videos.setdefault(stem, []).append(name)
        elif suffix.lower() == ".txt":
            if stem in texts:
                problems.append(f"'{escaped(texts[stem])}' and '{escaped(name)}' caption the same video")
            texts[stem] = name
    if not videos:
        raise DataError(
            f"the data root '{escaped(str(data.instance_data_root))}' has neither text files "
            f"'{escaped(data.caption_column)}' and '{escaped(data.video_column)}' nor videos with a .txt beside each"
        )
    for stem in sorted(videos.keys() | texts.keys()):
        names = videos.get(stem, [])
        if not names:
            problems.append(f"'{escaped(texts[stem])}' has no video beside it")
        elif stem not in texts:
            problems.append(f"'{escaped(names[0])}' has no text file '{escaped(Path(stem).name)}.txt' beside it")
        elif len(names) > 1:
            problems.append(f"'{escaped(texts[stem])}' has {len(names)} videos beside it: {_listed(sorted(names))}")
        else:
            try:
                caption = _read_caption(root, texts[stem])
            except DataError as error:
                problems.append(str(error))
                continue
            yield _Row(names[0], caption, escaped(names[0]))


def _walk(folder: Path, problems: list[str]) -> Iterator[str]:
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


def _read_caption(root: Path, name: str) -> str:
    """The text file beside a video, its lines joined; raises `DataError` where it holds no caption."""
    where = escaped(name)
    try:
        path = resolve_inside(root, name)
        size = path.stat().st_size
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    if size > 4 * MAX_CAPTION_BYTES:
        raise DataError(f"{where}: {size:,} bytes are no caption; the limit is {MAX_CAPTION_BYTES:,}")
    caption = " ".join(filter(None, map(str.strip, re.split(r"[\r\n]+", _read_text(path, where)))))
    if not caption:
        raise DataError(f"{where}: the text file is empty; write a caption")
    return caption


def _csv_rows(table: Path, data: Data, problems: list[str]) -> Iterator[_Row]:
    file = escaped(table.name)
    # Strict, because the default swallows the rest of the file after a quote that is never closed.
    reader = csv.reader(io.StringIO(_read_text(table, file), newline=""), strict=True)
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
        yield _Row(row[data.video_column].strip(), row[data.caption_column], f"{file} row {number}", start, end)
    if header is None:
        raise DataError(f"{file} is empty; its first line names the columns")


def _csv_number(field: str | None) -> object:
    if field is None or not field.strip():
        return None
    try:
        return float(field)
    except ValueError:
        return field


def _jsonl_rows(table: Path, data: Data, problems: list[str]) -> Iterator[_Row]:
    file = escaped(table.name)
    for number, line in enumerate(_read_text(table, file).split("\n"), start=1):
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
        yield _Row(row[data.video_column], row[data.caption_column], where, start, end)


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


def _parquet_rows(table: Path, data: Data, problems: list[str]) -> Iterator[_Row]:
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


def _dataset_rows(name: str, data: Data) -> Iterator[_Row]:
    """Rows of `datasets.load_dataset`, which runs no code of the data set's (it has no such option any more)."""
    folder = Path(name).resolve() if name and Path(name).is_dir() else None
    if folder is not None:
        _refuse_video_folder(folder)
    elif Path(name).exists() or not _HUB_NAME.fullmatch(name):
        raise DataError(
            f"dataset_name '{escaped(name)}' is no .csv, .jsonl or .parquet file, no folder and no hub name"
        )
    import datasets

    shown = escaped(folder.name if folder else name)
    try:
        # An absolute folder, because a bare "csv" or "json" is the name of a reader first.
        rows = datasets.load_dataset(str(folder or name), data.dataset_config_name, split="train")
    except Exception as error:  # its readers raise whatever the libraries below them raise
        raise DataError(f"dataset_name '{shown}': datasets.load_dataset fails: {_first_line(error)}") from error
    columns = _choose_columns(rows.column_names, data, f"'{shown}'")
    feature = rows.features[data.video_column]
    if isinstance(feature, datasets.Video | datasets.Image | datasets.Audio):
        raise DataError(
            f"'{shown}': column '{escaped(data.video_column)}' holds {type(feature).__name__} data; it must hold paths "
            "relative to instance_data_root"
        )
    for number, row in enumerate(rows.select_columns(columns), start=1):
        yield _table_row(row, data, f"{shown} row {number}")


def _refuse_video_folder(folder: Path) -> None:
    """`datasets` takes a folder with videos for a VideoFolder, whatever table lies in it, and asks for `file_name`."""
    names = list(_walk(folder, []))
    video = next((name for name in names if Path(name).suffix.lower() in VIDEO_SUFFIXES), None)
    if video is None:
        return
    tables = [name for name in names if Path(name).suffix.lower() in (".csv", ".jsonl", ".parquet")]
    hint = f"set dataset_name to the table, '{escaped(str(folder / tables[0]))}'" if tables else "name a table instead"
    raise DataError(
        f"dataset_name '{escaped(str(folder))}' is a folder that holds videos too ('{escaped(video)}'), which "
        f"`datasets` does not read by column names; {hint}"
    )


def _table_row(row: dict[str, Any], data: Data, where: str) -> _Row:
    start, end = row.get("start_seconds"), row.get("end_seconds")
    return _Row(row[data.video_column], row[data.caption_column], where, start, end)


def _choose_columns(names: Sequence[str], data: Data, table: str) -> list[str]:
    """The columns of `names` that are read; raises `DataError` where a wanted one is missing or ambiguous."""
    for wanted in (data.caption_column, data.video_column):
        if wanted not in names:
            nearest = sorted(names, key=lambda name: -difflib.SequenceMatcher(None, wanted, name).ratio())
            raise DataError(f"{table} has no column '{escaped(wanted)}'; there are {_listed(nearest)}")
    chosen = {data.caption_column, data.video_column, "start_seconds", "end_seconds"}
    for name in chosen:
        if names.count(name) > 1:
            raise DataError(f"{table} has {names.count(name)} columns '{escaped(name)}'")
    return [name for name in names if name in chosen]


def _check_row(row: _Row, root: Path, id_token: str) -> Source:
    """Raises `DataError` with the reason, without the row."""
    name = _check_text(row.video, "the video's path")
    path = resolve_inside(root, name)
    entries = row.caption if isinstance(row.caption, list) else [row.caption]
    if not entries:
        raise DataError("the list of captions is empty")
    captions = tuple(_check_caption(entry, id_token) for entry in entries)
    start = None if row.start_seconds is None else _check_number(row.start_seconds, "start_seconds")
    end = None if row.end_seconds is None else _check_number(row.end_seconds, "end_seconds")
    if start is not None and start < 0:
        raise DataError(f"start_seconds is {start:g}; it counts from the video's first frame")
    if end is not None and end <= (start or 0):
        raise DataError(f"end_seconds is {end:g}, not after the start at {start or 0:g}")
    return Source(path, Path(name).as_posix(), captions, start, end, row.where)


def _check_caption(entry: object, id_token: str) -> Caption:
    weight = 1.0
    if isinstance(entry, dict):
        unknown = [name for name in entry if name not in ("text", "weight")]
        if unknown:
            raise DataError(f"a caption has a field '{escaped(str(unknown[0]))}'; there are 'text' and 'weight'")
        if entry.get("weight") is not None:
            weight = _check_number(entry["weight"], "a caption's weight")
        entry = entry.get("text")
    if weight <= 0:
        raise DataError(f"a caption's weight is {weight:g}; it must be above 0")
    text = _check_text(entry, "the caption").strip()
    if len(text.encode()) > MAX_CAPTION_BYTES:
        raise DataError(f"the caption has {len(text.encode()):,} bytes; the limit is {MAX_CAPTION_BYTES:,}")
    return Caption(f"{id_token.strip()} {text}".strip(), weight)


def _check_text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} is {'missing' if value is None else f'of type {type(value).__name__}'}, not text")
    if "\0" in value:
        raise DataError(f"{what} has a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} has half a surrogate pair, which is not Unicode text") from None
    return value


def _check_number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{what} is '{escaped(str(value))}', not a number")
    if not -1e300 < value < 1e300:  # also false for NaN
        raise DataError(f"{what} is not a finite number")
    return float(value)


def _read_text(path: Path, where: str) -> str:
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


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{escaped(name)}'" for name in names[:12]) or "none"
    return shown + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _first_line(error: Exception) -> str:
    return escaped(str(error).strip().split("\n")[0]) or type(error).__name__

"""Sources: the user's rows, each a video and its captions, in four layouts, checked before anything is decoded.

- two text files in the data root, one caption and one video per line (the diffusers script's prompts.txt, videos.txt)
- a folder of x.mp4 + x.txt, at any depth; the whole text file is one caption, its lines joined by a space
- a .csv, .jsonl or .parquet table, by column names
- a folder or hub name for `datasets.load_dataset`, split "train", by column names

Tables may have `start_seconds` and `end_seconds`. In all but CSV a caption may be a list of texts or of {"text",
"weight"}. Captions lose white space at both ends. An empty caption must be explicit: a table's empty text is one, a
blank line or an empty text file is not. Rows count from 1: a CSV's header is row 1, a JSONL's row is its line.
"""

import math
import os
import re
import reprlib
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Never

from precompute.sources.tables import (
    Row,
    csv_rows,
    dataset_rows,
    escaped,
    jsonl_rows,
    listed,
    parquet_rows,
    read_text,
)
from shared.config import Data
from shared.errors import DataError, UsageError
from shared.file_types import VIDEO_SUFFIXES

MAX_CAPTION_BYTES = 16 * 1024
MAX_REPEATS = 10_000
MAX_SHOWN_ERRORS = 5
READERS = {".csv": csv_rows, ".jsonl": jsonl_rows, ".parquet": parquet_rows}

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


@dataclass(frozen=True, slots=True)
class Caption:
    """One text of a clip, `id_token` already in front, drawn in proportion to `weight`."""

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
    repeats: int = 1
    """Times that its clips come in an epoch."""
    loss_weight: float = 1.0
    """Factor of its clips' training loss."""


def read_sources(data: Data) -> list[Source]:
    """Return every row of the data set, in its order (a folder's by name).

    Raise `DataError` in one line: the first five row errors, each with its file and row, and the number of the rest.
    """
    root = data.instance_data_root.resolve()
    if not root.is_dir():
        raise DataError(f"instance_data_root '{escaped(str(data.instance_data_root))}' is not a folder")
    errors: list[str] = []
    sources: list[Source] = []
    try:
        for row in _read_rows(root, data):
            try:
                sources.append(_check_row(row, root, data.id_token))
            except DataError as error:
                errors.append(f"{row.where}: {error}")
    except DataError as error:
        errors.append(str(error))
    except OSError as error:
        raise DataError(f"'{escaped(str(error.filename))}' cannot be read: {error.strerror}") from error
    if errors:
        more = len(errors) - MAX_SHOWN_ERRORS
        raise DataError("; ".join(errors[:MAX_SHOWN_ERRORS]) + (f"; and {more} more" if more > 0 else ""))
    if not sources:
        raise DataError(f"'{escaped(data.dataset_name or str(data.instance_data_root))}' has no rows")
    return sources


def _read_rows(root: Path, data: Data) -> Iterator[Row]:
    """Return the rows of the layout that `data` describes."""
    table = Path(data.dataset_name or "")
    read_table = READERS.get(table.suffix.lower())
    if data.dataset_name is not None and (read_table is None or table.is_dir()):
        return dataset_rows(data.dataset_name, data)
    if data.dataset_config_name is not None:
        raise UsageError("data.dataset_config_name: only for `datasets.load_dataset`; leave it out for files")
    if read_table is not None:
        if not table.is_file():
            hint = f"; there is '{escaped(str(root / table))}'" if (root / table).is_file() else ""
            raise DataError(f"dataset_name '{escaped(str(table))}' is not a file{hint}")
        return read_table(table, data)
    present = {name: (root / name).is_file() for name in (data.caption_column, data.video_column)}
    if all(present.values()):
        return _text_file_rows(root, data)
    if any(present.values()):
        [found, missing] = sorted(present, key=lambda name: not present[name])
        raise DataError(f"'{escaped(found)}' is in the data root, '{escaped(missing)}' is not")
    return _folder_rows(root, data)


def _text_file_rows(root: Path, data: Data) -> Iterator[Row]:
    columns = []
    for name in (data.caption_column, data.video_column):
        lines = re.split(r"\r\n|\r|\n", read_text(resolve_inside(root, name), escaped(name)))
        columns.append([(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()])
    captions, videos = columns
    caption_file, video_file = escaped(data.caption_column), escaped(data.video_column)
    if len(captions) != len(videos):
        raise DataError(
            f"{caption_file} has {len(captions)} captions, {video_file} has {len(videos)} videos; "
            "each must have one line per clip"
        )
    for (caption_line, caption), (video_line, video) in zip(captions, videos, strict=True):
        yield Row(f"{video_file} line {video_line}, {caption_file} line {caption_line}", video, caption)


def _folder_rows(root: Path, data: Data) -> Iterator[Row]:
    """Yield a row per file name without its suffix; hidden files and folders are left out."""

    def fail(error: OSError) -> Never:
        raise error

    pairs: dict[str, tuple[list[str], list[str]]] = {}
    for parent, folders, names in os.walk(root, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in folders):
            if path.is_symlink():
                reason = "a link to a folder is not followed; move the folder into the data root"
                yield Row(escaped(path.relative_to(root).as_posix()), error=reason)
        for path in (Path(parent, name).relative_to(root) for name in sorted(names) if not name.startswith(".")):
            suffix = path.suffix.lower()
            if suffix == ".txt" or suffix in VIDEO_SUFFIXES:
                pair = pairs.setdefault(path.with_suffix("").as_posix(), ([], []))
                pair[suffix == ".txt"].append(path.as_posix())
    if not any(videos for videos, _ in pairs.values()):
        raise DataError(
            f"the data root '{escaped(str(data.instance_data_root))}' has neither text files "
            f"'{escaped(data.caption_column)}' and '{escaped(data.video_column)}' nor videos with a .txt beside each"
        )
    for _, (videos, texts) in sorted(pairs.items()):
        where = escaped((videos or texts)[0])
        if (len(videos), len(texts)) != (1, 1):
            got = listed([*videos, *texts])
            yield Row(where, error=f"expected one video and one .txt of this name, got {got}")
            continue
        try:
            yield Row(where, videos[0], _read_caption(root, texts[0]))
        except DataError as error:
            yield Row(escaped(texts[0]), error=str(error))


def _read_caption(root: Path, name: str) -> str:
    """Read the text file of a video and join its lines; raise `DataError` if it holds no caption."""
    path = resolve_inside(root, name)
    if (size := path.stat().st_size) > 4 * MAX_CAPTION_BYTES:
        raise DataError(f"is {size:,} bytes; the limit of a caption is {MAX_CAPTION_BYTES:,}")
    caption = " ".join(filter(None, map(str.strip, re.split(r"[\r\n]+", read_text(path, escaped(name))))))
    if not caption:
        raise DataError("the text file is empty; write a caption")
    return caption


def resolve_inside(root: Path, name: str) -> Path:
    """Return the regular file `name` below `root` (absolute, without links), free of links itself.

    Only plain relative names with forward slashes pass: "..", absolute names, drive letters, UNC names, URL schemes,
    control characters and lone surrogates are refused before the file system is asked. Links are followed; their
    targets must lie in the root. Nothing is opened. Raise `DataError` with the reason, without the row.
    """
    if not name.strip():
        raise DataError("the video's path is empty")
    shown = f"path '{escaped(name)}'"
    for refused, reason in (
        (any(ord(char) < 32 or 127 <= ord(char) < 160 for char in name), "has a control character"),
        (any("\ud800" <= char <= "\udfff" for char in name), "is not Unicode text"),
        ("\\" in name, "has a backslash; write forward slashes"),
        (_SCHEME.match(name), "starts with a URL scheme or drive letter; write it relative to the data root"),
        (name.startswith("/"), "is absolute; write it relative to the data root"),
        (".." in PurePosixPath(name).parts, "has '..'; write it relative to the data root"),
    ):
        if refused:
            raise DataError(f"{shown} {reason}")
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise DataError(f"{shown} is a link that leaves the data root")
        mode = path.lstat().st_mode
    except FileNotFoundError:
        raise DataError(f"{shown} not found in the data root") from None
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error.strerror}") from None
    except RuntimeError:  # raised by Python 3.11 and 3.12 for links in a circle
        raise DataError(f"{shown} is a link that leads to itself") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device, socket or named pipe"
        raise DataError(f"{shown} is {kind}, not a file")
    return path


def _check_row(row: Row, root: Path, id_token: str) -> Source:
    """Return the checked row; raise `DataError` with the reason, without the row."""
    if row.error:
        raise DataError(row.error)
    name = _check_text(row.video, "the video's path").strip()
    path = resolve_inside(root, name)
    entries = row.caption if isinstance(row.caption, list) else [row.caption]
    if not entries:
        raise DataError("the list of captions is empty")
    captions = tuple(_check_caption(entry, id_token) for entry in entries)
    start, end = _check_number(row.start_seconds, "start_seconds"), _check_number(row.end_seconds, "end_seconds")
    if start is not None and start < 0:
        raise DataError(f"start_seconds is {start:g}; it counts from the video's first frame")
    if end is not None and end <= (start or 0):
        raise DataError(f"end_seconds is {end:g}; it must be after the start at {start or 0:g}")
    weight = _check_number(row.loss_weight, "loss_weight")
    if weight is not None and weight < 0:
        raise DataError(f"loss_weight is {weight:g}; it must be 0 or above")
    repeats = _check_number(row.repeats, "repeats")
    repeats = 1 if repeats is None else repeats
    if repeats not in range(1, MAX_REPEATS + 1):
        raise DataError(f"repeats is {repeats:g}; it must be a whole number from 1 to {MAX_REPEATS:,}")
    where = row.where
    return Source(
        path, Path(name).as_posix(), captions, start, end, where, int(repeats), 1.0 if weight is None else weight
    )


def _check_caption(entry: object, id_token: str) -> Caption:
    weight: float | None = None
    if isinstance(entry, dict):
        if unknown := entry.keys() - {"text", "weight"}:
            raise DataError(f"a caption has a field '{escaped(str(min(unknown)))}'; expected 'text' and 'weight'")
        weight = _check_number(entry.get("weight"), "a caption's weight")
        entry = entry.get("text")
    weight = 1.0 if weight is None else weight
    if weight <= 0:
        raise DataError(f"a caption's weight is {weight:g}; it must be above 0")
    text = _check_text(entry, "the caption").strip()
    if (size := len(text.encode())) > MAX_CAPTION_BYTES:
        raise DataError(f"the caption has {size:,} bytes; the limit is {MAX_CAPTION_BYTES:,}")
    return Caption(f"{id_token.strip()} {text}".strip(), weight)


def _check_text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is {'missing' if value is None else f'of type {type(value).__name__}'}, not text")
    if "\0" in value:
        raise DataError(f"{name} has a NUL character")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise DataError(f"{name} has half a surrogate pair, which is not Unicode text")
    return value


def _check_number(value: object, name: str) -> float | None:
    """Return a number or the number in a text; None for None and for an empty field of a CSV file."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        number = float(value)
    except ValueError:
        raise DataError(f"{name} is {escaped(reprlib.repr(value))}, not a number") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise DataError(f"{name} is not a finite number")
    return number

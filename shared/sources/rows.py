"""Sources: the user's rows, each a video and its captions, in many layouts, checked before anything is decoded.

- two text files in the data root, one caption and one video per line (prompts.txt and videos.txt)
- a folder of x.mp4 + x.txt, at any depth; the whole text file is one caption, its lines joined by a space
- a .csv, .jsonl or .parquet table, by column names; metadata.csv, .jsonl or .parquet in the data root is found
- webdataset tars: a .tar file, a folder of them, or a pattern such as shards/*.tar
- a folder or hub name for `datasets.load_dataset`, split "train", by column names

Columns of videos hold paths, or the bytes of a video. Tables may have `start_seconds`, `end_seconds`, `repeats` and
`loss_weight`. In all but CSV a caption may be a list of texts or of {"text", "weight"}. Captions lose white space at
both ends. A row without a caption takes `data.default_caption` or is skipped; so is a row with a fault. Rows count from
1: a CSV's header is row 1, a JSONL's row is its line.
"""

import math
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shared.caption_lint import with_trigger
from shared.config import Data
from shared.errors import DataError, UsageError
from shared.sources.embedded import Embedded, VideoCopies, embedded_in, tar_rows
from shared.sources.folder import folder_rows, stray_warnings
from shared.sources.root import DataRoot
from shared.sources.tables import (
    MAX_CAPTION_BYTES,
    Row,
    csv_rows,
    dataset_rows,
    escaped,
    jsonl_rows,
    parquet_rows,
    read_text,
)

MAX_REPEATS = 10_000
MAX_SHOWN_ERRORS = 5
READERS = {".csv": csv_rows, ".jsonl": jsonl_rows, ".parquet": parquet_rows}
TABLE_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
CAPTION_FILES = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt", "text.txt")
VIDEO_FILES = ("videos.txt", "video.txt")
"""Files in the data root that are found where the columns have their default names."""


@dataclass(frozen=True, slots=True)
class Caption:
    """One text of a clip, `id_token` already in front, drawn in proportion to `weight`."""

    text: str
    weight: float


@dataclass(frozen=True, slots=True)
class Source:
    """One row of the user's data set; `captions` has at least one, unless the row is skipped."""

    path: Path
    """Absolute and free of links: a regular file."""
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
    skipped: str = ""
    """The reason why the row is left out; empty if it is not."""


@dataclass(frozen=True, slots=True)
class Listing:
    """The rows of a data set, in its order (a folder's by name), and what is odd about its files."""

    sources: list[Source]
    warnings: list[str]


def read_sources(data: Data) -> Listing:
    """Return every row of the data set; a row with a fault is skipped, with the fault as its reason.

    Raise `DataError` in one line for a table or text file that cannot be read, and where every row has a fault.
    """
    root = DataRoot(data.instance_data_root.resolve(), data.follow_links)
    if not root.folder.is_dir():
        raise DataError(f"instance_data_root '{escaped(str(data.instance_data_root))}' is not a folder")
    faults: list[str] = []
    sources: list[Source] = []
    copies = VideoCopies(data.embedded_videos_gib)
    try:
        rows, warnings = _read_rows(root, data)
        for row in rows:
            try:
                sources.append(_check_row(row, root, data, copies))
            except DataError as error:
                name = row.video if isinstance(row.video, str) else row.where
                faults.append(f"{row.where}: {error}")
                reason = f"unusable: {error if name == row.where else faults[-1]}"
                sources.append(Source(root.folder, name, (), None, None, row.where, skipped=reason))
    except OSError as error:
        raise DataError(f"'{escaped(str(error.filename))}' cannot be read: {error.strerror}") from error
    if not sources:
        raise DataError(f"'{escaped(data.dataset_name or str(data.instance_data_root))}' has no rows")
    if len(faults) == len(sources):
        more = len(faults) - MAX_SHOWN_ERRORS
        raise DataError("; ".join(faults[:MAX_SHOWN_ERRORS]) + (f"; and {more} more" if more > 0 else ""))
    return Listing(sources, warnings)


def _read_rows(root: DataRoot, data: Data) -> tuple[Iterator[Row] | list[Row], list[str]]:
    """Return the rows of the layout that `data` describes, and warnings."""
    if data.dataset_name is not None and (tars := _tars(data.dataset_name)):
        return tar_rows(tars, data), []
    table = Path(data.dataset_name or "")
    read_table = READERS.get(table.suffix.lower())
    if data.dataset_name is not None and (read_table is None or table.is_dir()):
        return dataset_rows(data.dataset_name, data), []
    if data.dataset_config_name is not None:
        raise UsageError("data.dataset_config_name: only for `datasets.load_dataset`; leave it out for files")
    if read_table is not None:
        if not table.is_file():
            there = root.folder / table
            hint = f"; there is '{escaped(str(there))}'" if there.is_file() else ""
            raise DataError(f"dataset_name '{escaped(str(table))}' is not a file{hint}")
        return read_table(table, data), []
    captions = _present(root, data.caption_column, "text", CAPTION_FILES)
    videos = _present(root, data.video_column, "video", VIDEO_FILES)
    if captions and videos:
        return _text_file_rows(root, captions, videos), []
    for column, found, other in ((data.video_column, captions, "captions"), (data.caption_column, videos, "videos")):
        if found and column.lower().endswith(".txt"):
            raise DataError(f"'{escaped(found)}' with the {other} is in the data root, '{escaped(column)}' is not")
    for name in TABLE_NAMES:
        if (root.folder / name).is_file():
            return READERS[Path(name).suffix](root.find(name), data), []
    if tars := sorted(root.folder.glob("*.tar")):
        return tar_rows(tars, data), []
    rows, stray, warnings = folder_rows(root, data)
    return rows, warnings + stray_warnings(stray)


def _tars(name: str) -> list[Path]:
    """Return the tars that a dataset_name means: a file, a folder of tars, or a pattern."""
    if name.lower().endswith(".tar"):
        found = [Path(name)] if Path(name).is_file() else sorted(Path(name).parent.glob(Path(name).name))
        if not found:
            raise DataError(f"dataset_name '{escaped(name)}' is not a file")
        return found
    return sorted(Path(name).glob("*.tar")) if Path(name).is_dir() else []


def _present(root: DataRoot, column: str, default: str, usual: tuple[str, ...]) -> str:
    """Return the text file in the root that `column` names, or the first usual one; "" if there is none."""
    names = (column, *usual) if column == default else (column,)
    return next((name for name in names if (root.folder / name).is_file()), "")


def _text_file_rows(root: DataRoot, captions: str, videos: str) -> Iterator[Row]:
    columns = []
    for name in (captions, videos):
        lines = re.split(r"\r\n|\r|\n", read_text(root.find(name), escaped(name)).rstrip())
        blank = [str(number) for number, line in enumerate(lines, start=1) if not line.strip()]
        if blank:
            numbers = ", ".join(blank[:MAX_SHOWN_ERRORS]) + (" ..." if len(blank) > MAX_SHOWN_ERRORS else "")
            raise DataError(
                f"{escaped(name)}: line {numbers} is blank, so that pairs may be shifted; "
                "give every clip one line in both files"
            )
        columns.append(lines)
    if len(columns[0]) != len(columns[1]):
        raise DataError(
            f"{escaped(captions)} has {len(columns[0])} captions, {escaped(videos)} has {len(columns[1])} videos; "
            "each must have one line per clip"
        )
    for number, (caption, video) in enumerate(zip(*columns, strict=True), start=1):
        yield Row(f"{escaped(videos)} line {number}, {escaped(captions)} line {number}", video, caption)


def _check_row(row: Row, root: DataRoot, data: Data, copies: VideoCopies) -> Source:
    """Return the checked row; raise `DataError` with the reason, without the row."""
    if row.error:
        raise DataError(row.error)
    entries = [entry for entry in _entries(row.caption) if _text_of(entry)] or _entries(data.default_caption)
    if isinstance(row.caption, list) and len(row.caption) > 1:
        entries = row.caption  # an empty text among others is one of them
    captions = tuple(_check_caption(entry, data.id_token) for entry in entries)
    start, end = _check_number(row.start_seconds, "start_seconds"), _check_number(row.end_seconds, "end_seconds")
    if start is not None and start < 0:
        raise DataError(f"start_seconds is {start:g}; it counts from the start of the video")
    if end is not None and end <= (start or 0):
        raise DataError(f"end_seconds is {end:g}; it must be after the start at {start or 0:g}")
    weight = _check_number(row.loss_weight, "loss_weight")
    weight = 1.0 if weight is None else weight
    if weight < 0:
        raise DataError(f"loss_weight is {weight:g}; it must be 0 or above")
    repeats = _check_number(row.repeats, "repeats")
    repeats = 1 if repeats is None else repeats
    if repeats not in range(MAX_REPEATS + 1):
        raise DataError(f"repeats is {repeats:g}; it must be a whole number from 0 to {MAX_REPEATS:,}")
    path, name = _find_video(row, root, copies)
    skipped = "" if captions else "no caption: write one, or set data.default_caption"
    skipped = skipped if repeats else "repeats is 0"
    return Source(path, name, captions, start, end, row.where, int(repeats), weight, skipped)


def _find_video(row: Row, root: DataRoot, copies: VideoCopies) -> tuple[Path, str]:
    """Return the path of a row's video, copied out of the table if it is inside, and its name for display."""
    video = embedded_in(row.video, row.where)
    if isinstance(video, Embedded):
        return copies.keep(video), video.name
    if isinstance(video, Path):
        if not video.is_file():
            raise DataError(f"path '{escaped(str(video))}' not found")
        return video, video.name
    name = _check_text(video, "the video's path").removeprefix(f"{root.folder}/")
    path = root.find(name)
    return path, Path(name if (root.folder / name).exists() else name.strip()).as_posix()


def _entries(caption: object) -> list[object]:
    """Return the captions of a cell as a list; None is no caption."""
    return caption if isinstance(caption, list) else [] if caption is None else [caption]


def _text_of(entry: object) -> object:
    """Return a caption's text without white space, or any other value, which `_check_caption` refuses."""
    text = entry.get("text", True) if isinstance(entry, dict) else entry
    return text.strip() if isinstance(text, str) else text is not None


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
    return Caption(with_trigger(id_token, text), weight)


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

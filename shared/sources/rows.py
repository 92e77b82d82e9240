"""Sources: the user's rows, each a video and its captions, in many layouts, checked before anything is decoded.

- two text files in the data root, one caption and one video per line (prompts.txt and videos.txt)
- a folder of x.mp4 + x.txt, at any depth; the whole text file is one caption, its lines joined by a space
- a .csv, .jsonl or .parquet table, by column names; metadata.csv, .jsonl or .parquet in the data root is found
- webdataset tars: a .tar file, a folder of them, or a pattern such as shards/*.tar
- a folder or hub name for `datasets.load_dataset`, split "train", by column names

Columns of videos hold paths, or the bytes of a video. Tables may have `start_seconds`, `end_seconds`, `repeats` and
`loss_weight`. In all but CSV a caption may be a list of texts or of {"text", "weight"}. Captions lose white space at
both ends. A row without a caption takes `data.default_caption` or is skipped; so is a row with a fault. Rows count from
1; those of CSV and JSONL are named by their line.
"""

import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

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
        return tar_rows({tar.name: tar.resolve() for tar in tars}, data), []
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
        return read_table(table.resolve(), data), []
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
        return tar_rows({tar.name: root.find(tar.name) for tar in tars}, data), []
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
    videos, captions = escaped(videos), escaped(captions)
    for number, (caption, video) in enumerate(zip(*columns, strict=True), start=1):
        yield Row(f"{videos} line {number}, {captions} line {number}", video, caption)


def _encodable(text: str) -> str:
    if (size := len(text.strip().encode())) > MAX_CAPTION_BYTES:  # raises for half a surrogate pair
        raise ValueError(f"has {size:,} bytes; the limit is {MAX_CAPTION_BYTES:,}")
    return text


class CaptionCell(BaseModel):
    """One caption of a cell."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    text: Annotated[str, AfterValidator(_encodable)]
    weight: Annotated[float, Field(gt=0), BeforeValidator(lambda weight: 1.0 if weight is None else weight)] = 1.0


class RowCells(BaseModel):
    """The cells of a row but for its video; a blank one of a CSV file has been left out."""

    model_config = ConfigDict(allow_inf_nan=False)

    captions: list[CaptionCell]
    start_seconds: Annotated[float, Field(ge=0)] | None = None
    end_seconds: float | None = None
    repeats: Annotated[int, Field(ge=0, le=MAX_REPEATS)] = 1
    loss_weight: Annotated[float, Field(ge=0)] = 1.0


def _check_row(row: Row, root: DataRoot, data: Data, copies: VideoCopies) -> Source:
    """Return the checked row; raise `DataError` with the reason, without the row."""
    if row.error:
        raise DataError(row.error)
    given = {name: cell for name, cell in row.options.items() if cell is not None and str(cell).strip()}
    try:
        cells = RowCells.model_validate({"captions": _captions(row.caption, data.default_caption), **given})
    except ValidationError as error:
        first = error.errors()[0]
        name, problem = ".".join(map(str, first["loc"])), first["msg"].replace("Input should", "should")
        problem = problem.removeprefix("Value error, ")
        raise DataError(f"{name} = {escaped(reprlib.repr(first['input']))}: {escaped(problem)}") from None
    start, end = cells.start_seconds, cells.end_seconds
    if end is not None and end <= (start or 0):
        raise DataError(f"end_seconds is {end:g}; it must be after the start at {start or 0:g}")
    captions = tuple(Caption(with_trigger(data.id_token, cell.text), cell.weight) for cell in cells.captions)
    path, name = _find_video(row, root, copies)
    skipped = "" if captions else "no caption: write one, or set data.default_caption"
    skipped = skipped if cells.repeats else "repeats is 0"
    return Source(path, name, captions, start, end, row.where, cells.repeats, cells.loss_weight, skipped)


def _captions(cell: object, default: str | None) -> list[dict[str, object]]:
    """Return the captions of a cell, or the default where it has none; an empty one among others is a caption."""
    cells = cell if isinstance(cell, list) else [cell]
    entries = [entry if isinstance(entry, dict) else {"text": entry} for entry in cells]
    blank = all(not str(entry.get("text", "missing") or "").strip() for entry in entries)
    if blank and len(entries) <= 1:
        return [] if default is None else [{"text": default}]
    return entries


def _find_video(row: Row, root: DataRoot, copies: VideoCopies) -> tuple[Path, str]:
    """Return the path of a row's video, copied out of the table if it is inside, and its name for display."""
    video = embedded_in(row.video, row.where)
    if isinstance(video, Embedded):
        return copies.keep(video), video.name
    if isinstance(video, Path):
        if not video.is_file():
            raise DataError(f"path '{escaped(str(video))}' not found")
        return video, video.name
    if not isinstance(video, str):
        raise DataError(f"the video's path is {escaped(reprlib.repr(video))}, not text")
    name = video.removeprefix(f"{root.folder}/")
    path = root.find(name)
    spaced = name != name.strip() and (root.folder / name).exists()
    return path, Path(name if spaced else name.strip()).as_posix()

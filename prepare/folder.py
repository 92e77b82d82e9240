"""A folder as people have it: which files are videos, their captions, and what is left out with the reason."""

import csv
import io
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from prepare.probe import VideoSummary, probe
from shared.console import Progress
from shared.errors import DataError
from shared.file_types import VIDEO_SUFFIXES

VIDEO_COLUMNS = ("video", "file_name", "video_path", "path", "file")
CAPTION_COLUMNS = ("text", "caption", "prompt")
CAPTION_LISTS = ("prompts.txt", "prompt.txt")
VIDEO_LIST = "videos.txt"
CAPTION_TABLE = "metadata.csv"
MAX_TEXT_BYTES = 1 << 26


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderContents:
    """Names are relative to the folder, with forward slashes, sorted."""

    videos: Mapping[str, VideoSummary]
    captions: Mapping[str, str]
    """Caption of each video, empty where there is none."""
    left_out: Mapping[str, str]
    """File -> reason."""
    notes: tuple[str, ...]
    """Caption files that could not be read."""


def look_into(folder: Path) -> FolderContents:
    """Probe every video below `folder` and find the captions. Raises `DataError` if there is no such folder."""
    if not folder.is_dir():
        raise DataError(f"--videos {folder}: not a folder; give the folder that holds the videos")
    names = sorted(_walk(folder))
    candidates = [name for name in names if PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES]
    others = sorted(set(names) - set(candidates))
    captions, used, notes = _captions(folder, candidates, others)
    videos: dict[str, VideoSummary] = {}
    left_out = {name: "not a video" for name in others if name not in used}
    with Progress("looking", len(candidates)) as bar:
        for name in candidates:
            try:
                _check_name(folder, name)
                videos[name] = probe(folder / name)
            except DataError as error:
                left_out[name] = str(error)
            bar.advance()
    return FolderContents(videos=videos, captions=captions, left_out=left_out, notes=tuple(notes))


def _walk(folder: Path) -> Iterator[str]:
    """Yield the files below `folder`; hidden ones and what lies behind links to folders are left out."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from ((Path(parent) / name).relative_to(folder).as_posix() for name in files if not name.startswith("."))


def _check_name(folder: Path, name: str) -> None:
    """Raise `DataError` for a name that a table cannot hold, or that stage 1 would refuse."""
    if any("\ud800" <= char <= "\udfff" for char in name):
        raise DataError("its name is not Unicode text; rename it")
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise DataError("a link that leads out of the folder; copy the file into it")


def _captions(folder: Path, videos: list[str], others: list[str]) -> tuple[dict[str, str], set[str], list[str]]:
    """Return the captions of `videos`, the files among `others` that were read for them, and notes.

    A text file with the video's own name comes first, then metadata.csv, then prompts.txt with videos.txt. Names are
    compared in Unicode's composed form (NFC), because file systems and editors differ in it.
    """
    stems = {_nfc(_stem(video)) for video in videos}
    there = set(others)
    lists = [prompts for prompts in CAPTION_LISTS if {prompts, VIDEO_LIST} <= there]
    readers: list[tuple[tuple[str, ...], Callable[[], dict[str, str]]]] = [
        *(((prompts, VIDEO_LIST), partial(_listed_pairs, folder, prompts)) for prompts in lists),
        *(((name,), partial(_csv_pairs, folder)) for name in there & {CAPTION_TABLE}),
    ]
    taken = {name for files, _ in readers for name in files}
    beside = [name for name in others if name.lower().endswith(".txt") and _nfc(_stem(name)) in stems]
    readers += [((name,), partial(_beside, folder, name)) for name in beside if name not in taken]
    found: dict[str, str] = {}
    notes: list[str] = []
    for files, read in readers:
        try:
            found |= {name: " ".join(text.split()) for name, text in read().items() if text.strip()}
        except (DataError, OSError, csv.Error) as error:
            notes.append(f"{' and '.join(files)}: not used: {error}")
    captions = {video: found.get(_nfc(_stem(video))) or found.get(_nfc(video)) or "" for video in videos}
    return captions, {name for files, _ in readers for name in files}, notes


def _beside(folder: Path, name: str) -> dict[str, str]:
    return {_nfc(_stem(name)): _read(folder / name)}


def _listed_pairs(folder: Path, prompts: str) -> dict[str, str]:
    """Return the captions of two files with one line per video."""
    columns = []
    for name in (prompts, VIDEO_LIST):
        lines = _read(folder / name).rstrip().splitlines()
        blank = next((number for number, line in enumerate(lines, start=1) if not line.strip()), None)
        if blank:
            raise DataError(f"{name} line {blank} is blank, so that pairs may be shifted")
        columns.append(lines)
    if len(columns[0]) != len(columns[1]):
        raise DataError(f"{len(columns[0])} captions for {len(columns[1])} videos; each needs one line per clip")
    return {_nfc(video.strip()): caption for caption, video in zip(*columns, strict=True)}


def _csv_pairs(folder: Path) -> dict[str, str]:
    reader = csv.DictReader(io.StringIO(_read(folder / CAPTION_TABLE), newline=""), strict=True)
    header = reader.fieldnames or []
    video = next((name for name in VIDEO_COLUMNS if name in header), None)
    caption = next((name for name in CAPTION_COLUMNS if name in header), None)
    if video is None or caption is None:
        raise DataError(f"expected a column of {VIDEO_COLUMNS} and one of {CAPTION_COLUMNS}, got {list(header)}")
    return {_nfc((row[video] or "").strip()): row[caption] or "" for row in reader}


def _read(path: Path) -> str:
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise DataError(f"has more than {MAX_TEXT_BYTES:,} bytes")
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError("not UTF-8 text; save it as UTF-8") from None


def _stem(name: str) -> str:
    return name.removesuffix(PurePosixPath(name).suffix)


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)

"""A folder as people have it: which files are videos, their captions, and what is left out with the reason."""

import csv
import io
import os
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from prepare.probe import IMAGE_SUFFIXES, VIDEO_SUFFIXES, VideoSummary, probe
from shared.console import Progress
from shared.errors import DataError

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
    """Captions that are not empty, by video."""
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
    others = [name for name in names if name not in set(candidates)]
    captions, used, notes = _captions(folder, candidates, others)
    videos: dict[str, VideoSummary] = {}
    left_out: dict[str, str] = {}
    with Progress("looking", len(candidates)) as bar:
        for name in candidates:
            found = _unfit_name(name) or probe(folder / name)
            if isinstance(found, VideoSummary):
                videos[name] = found
            else:
                left_out[name] = found
            bar.advance()
    for name in others:
        if name not in used:
            image = PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES
            left_out[name] = "an image, no video" if image else "no video"
    return FolderContents(videos=videos, captions=captions, left_out=left_out, notes=tuple(notes))


def _walk(folder: Path) -> Iterator[str]:
    """Yield the files below `folder`; hidden ones and what lies behind links to folders are left out."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield (Path(parent) / name).relative_to(folder).as_posix()


def _unfit_name(name: str) -> str | None:
    """Return why a table cannot hold the name."""
    if any("\ud800" <= char <= "\udfff" for char in name):
        return "its name is not Unicode text; rename it"
    if any(unicodedata.category(char) == "Cc" for char in name):
        return "its name has a control character; rename it"
    return None


def _captions(folder: Path, videos: list[str], others: list[str]) -> tuple[dict[str, str], set[str], list[str]]:
    """Return the captions of `videos`, the files among `others` that belong to captions, and notes.

    A text file with the video's own name comes first, then metadata.csv, then prompts.txt with videos.txt. Names are
    compared in Unicode's composed form (NFC), because file systems and editors differ in it.
    """
    by_name: dict[str, str] = {}
    used: set[str] = set()
    notes: list[str] = []

    def read(*files: str) -> None:
        used.update(files)
        try:
            by_name.update(_csv_pairs(folder) if files == (CAPTION_TABLE,) else _listed_pairs(folder, *files))
        except (DataError, OSError, csv.Error) as error:
            notes.append(f"{' and '.join(files)}: not used: {error}")

    for prompts in CAPTION_LISTS:
        if {prompts, VIDEO_LIST} <= set(others):
            read(prompts, VIDEO_LIST)
    if CAPTION_TABLE in others:
        read(CAPTION_TABLE)
    stems = {_nfc(_stem(video)) for video in videos}
    beside = {_nfc(_stem(name)): name for name in others if name.lower().endswith(".txt") and name not in used}
    for stem in sorted(beside.keys() & stems):
        used.add(beside[stem])
        try:
            by_name[stem] = _read(folder / beside[stem])
        except (DataError, OSError) as error:
            notes.append(f"{beside[stem]}: not used: {error}")
    found = {video: by_name.get(_nfc(_stem(video)), by_name.get(_nfc(video), "")) for video in videos}
    return {video: " ".join(text.split()) for video, text in found.items() if text.strip()}, used, notes


def _listed_pairs(folder: Path, prompts: str, videos: str) -> dict[str, str]:
    """Return the captions of two files with one line per video."""
    columns = []
    for name in (prompts, videos):
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

"""A folder of videos with a .txt of the same name beside each, as people have it: nothing small stops a run."""

import os
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Never

from shared.config import Data
from shared.errors import DataError
from shared.file_types import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from shared.sources.root import DataRoot, composed
from shared.sources.tables import MAX_CAPTION_BYTES, Row, escaped, listed, read_text


def folder_rows(root: DataRoot, data: Data) -> tuple[list[Row], list[str], list[str]]:
    """Return a row per video, sorted by name, the stray files, and warnings. Raise `DataError` if there is no video.

    A video without a caption, or with one that cannot be read, has a row that is skipped.
    """
    names, warnings = _files(root)
    suffixes = video_suffixes(data)
    seen = [name for name in names if not PurePosixPath(name).name.startswith(".")]
    videos = [name for name in seen if PurePosixPath(name).suffix.lower() in suffixes]
    if not videos:
        raise DataError(
            f"the data root '{escaped(str(data.instance_data_root))}' has neither text files of captions and videos "
            f"(prompts.txt, videos.txt), nor metadata.csv or .jsonl, nor videos{_stray(names)}"
        )
    texts: dict[str, list[str]] = defaultdict(list)
    for name in seen:
        if name.lower().endswith(".txt"):
            texts[composed(name[:-4])].append(name)
    rows, used = [], set(videos)
    for video in videos:
        stem = str(PurePosixPath(video).with_suffix(""))
        found = sorted({*texts[composed(stem)], *texts[composed(video)]}, key=lambda name: (name[-4:] != ".txt", name))
        used.update(found)
        captions = [name for name in found if name[:-4] in (stem, video)] or found
        if len(captions) > 1:
            warnings.append(f"{escaped(video)}: of {listed(captions)} the first is its caption")
        try:
            text = read_caption(root, captions[0]) if captions else None
            rows.append(Row(escaped(video), video, text))
        except DataError as error:
            rows.append(Row(escaped(video), video, error=f"its caption {escaped(captions[0])}: {error}"))
    return rows, [name for name in names if name not in used], warnings


def video_suffixes(data: Data) -> Collection[str]:
    """Return the suffixes of files that are clips: videos, and images where a bucket has one frame."""
    return VIDEO_SUFFIXES | IMAGE_SUFFIXES if 1 in data.frame_buckets else VIDEO_SUFFIXES


def read_caption(root: DataRoot, name: str) -> str:
    """Read the text file of a video and join its lines. Raise `DataError` with the reason, without the name."""
    path = root.find(name)
    if (size := path.stat().st_size) > 4 * MAX_CAPTION_BYTES:
        raise DataError(f"is {size:,} bytes; the limit of a caption is {MAX_CAPTION_BYTES:,}")
    return " ".join(filter(None, map(str.strip, re.split(r"[\r\n]+", read_text(path, "")))))


def _files(root: DataRoot) -> tuple[list[str], list[str]]:
    """Return the files below the root, relative to it and sorted, and a warning for each linked folder left out."""

    def fail(error: OSError) -> Never:
        raise error

    found, warnings, seen = [], [], {root.folder}
    for parent, folders, names in os.walk(root.folder, followlinks=root.follow_links, onerror=fail):
        kept = []
        for name in sorted(folders):
            path = Path(parent, name)
            shown = escaped(path.relative_to(root.folder).as_posix())
            if name.startswith("."):
                continue
            if path.is_symlink() and not root.follow_links:
                warnings.append(f"{shown}: a link to a folder is not followed; data.follow_links=true follows it")
            elif path.is_symlink() and (path.resolve() in seen or path.parent.resolve().is_relative_to(path.resolve())):
                warnings.append(f"{shown}: a link to a folder that is read already is not followed")
            else:
                seen |= {path.resolve()} if path.is_symlink() else set()
                kept.append(name)
        folders[:] = kept
        found += [Path(parent, name).relative_to(root.folder).as_posix() for name in names]
    return sorted(found), warnings


def stray_warnings(names: Sequence[str]) -> list[str]:
    """Return a warning for files that are not used."""
    return [f"{len(names)} files are no part of the data set: {listed(names)}{_stray(names)}"] if names else []


def _stray(names: Sequence[str]) -> str:
    """Return advice on images among files that are not used."""
    images = any(PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES for name in names)
    return "; images are clips where data.frame_buckets has 1" if images else ""

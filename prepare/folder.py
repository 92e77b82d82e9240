"""A folder as people have it: which files are videos, their captions, and what is left out with the reason."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from prepare.videos import VideoSummary
from shared.config import Data, Precompute
from shared.console import Progress
from shared.errors import DataError
from shared.file_types import IMAGE_SUFFIXES, with_names
from shared.media.pool import decode_pool
from shared.media.probe import Skipped
from shared.sources.folder import folder_rows
from shared.sources.root import DataRoot, composed
from shared.sources.rows import CAPTION_FILES, TABLE_NAMES, VIDEO_FILES, read_sources


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderContents:
    """Names are relative to the folder, with forward slashes, sorted."""

    videos: Mapping[str, VideoSummary]
    captions: Mapping[str, str]
    """Caption of each video, empty where there is none."""
    left_out: Mapping[str, str]
    """File -> reason."""
    notes: tuple[str, ...]
    """Oddities of the files and captions."""


def look_into(folder: Path, *, follow_links: bool = False) -> FolderContents:
    """Probe every video below `folder` and find the captions. Raises `DataError` if there is none.

    A caption is that of the list or table that stage 1 would read from the folder, else the video's own text file.
    """
    if not folder.is_dir():
        raise DataError(f"--videos {folder}: not a folder; give the folder that holds the videos")
    data = Data(name="init", instance_data_root=folder, follow_links=follow_links)
    root = DataRoot(folder.resolve(), follow_links)
    rows, stray, warnings = folder_rows(root, data)
    captions = {composed(str(row.video)): row.caption for row in rows}
    notes = [*warnings, *(f"{row.where}: {row.error}" for row in rows if row.error)]
    lists = {*CAPTION_FILES, *VIDEO_FILES, *TABLE_NAMES} & set(stray)
    try:
        found = read_sources(data).sources if lists else []
        lists = {name for name in lists if any(name in source.where for source in found)}
        captions |= {composed(source.name): source.captions[0].text for source in found if source.captions}
    except DataError as error:
        notes.append(f"captions are not used: {error}")
        lists = set()
    shown = [name for name in stray if name not in lists and not PurePosixPath(name).name.startswith(".")]
    left_out = {name: _why_stray(name) for name in shown}
    paths: dict[str, Path] = {}
    for name in (str(row.video) for row in rows):
        try:
            paths[name] = root.find(name)
        except DataError as error:
            left_out[name] = str(error).replace("data.follow_links=true", "--follow-links")
    videos: dict[str, VideoSummary] = {}
    with decode_pool(Precompute(cache="cache")) as pool, Progress("looking", len(paths)) as bar:
        for name, outcome in zip(paths, pool.probe_all(paths.values()), strict=True):
            if isinstance(outcome, Skipped):
                left_out[name] = with_names(outcome.reason, name)
            else:
                height, width = outcome.probe.look.size
                videos[name] = VideoSummary(outcome.end_us / 1e6, height, width)
            bar.advance()
    texts = {name: " ".join(str(captions.get(composed(name)) or "").split()) for name in paths}
    return FolderContents(videos=videos, captions=texts, left_out=left_out, notes=tuple(notes))


def _why_stray(name: str) -> str:
    is_image = PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES
    return "not a video" + (": images are clips where data.frame_buckets has 1" if is_image else "")

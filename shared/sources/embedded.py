"""Videos inside other files, copied to the user's cache folder under the hash of their bytes.

Hub data sets and parquet tables hold {"bytes", "path"} in a column; a webdataset tar holds `x.mp4` with `x.txt` or
`x.json`. Nothing is extracted by name: a copy is named by its content.
"""

import hashlib
import json
import shutil
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import IO

from shared.atomic_files import replacing, user_folder
from shared.config import Data
from shared.errors import DataError, UsageError
from shared.file_types import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from shared.regular_files import open_regular
from shared.sources.folder import video_suffixes
from shared.sources.tables import CAPTION_NAMES, MAX_CAPTION_BYTES, OPTIONAL_COLUMNS, Row, escaped

MAX_JSON_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Embedded:
    """A video inside another file."""

    name: str
    """For display; its suffix is kept."""
    stream: IO[bytes]


@dataclass(slots=True)
class VideoCopies:
    """Copies of embedded videos, at most `limit_gib` of them; those of earlier runs make room."""

    limit_gib: float
    _used: dict[Path, int] = field(default_factory=dict)
    """Copies that this run needs -> size."""

    def keep(self, video: Embedded) -> Path:
        """Return the copy of a video, made unless it exists. Raise `DataError` or `UsageError` if it cannot be kept."""
        folder = (user_folder() / "embedded").resolve()  # a video's path must be free of links
        folder.mkdir(parents=True, exist_ok=True)
        digest, size = hashlib.sha256(), 0
        while chunk := video.stream.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
        if not size:
            raise DataError("the embedded video is empty")
        suffix = PurePosixPath(video.name).suffix.lower()
        path = folder / (digest.hexdigest() + (suffix if suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES else ""))
        if path not in self._used:
            self._used[path] = size
            self._make_room(folder)
        if not path.exists() or path.stat().st_size != size:
            video.stream.seek(0)
            with replacing(path) as pending, pending.open("wb") as file:
                shutil.copyfileobj(video.stream, file, 1 << 20)
        return path

    def _make_room(self, folder: Path) -> None:
        needed, limit = sum(self._used.values()), self.limit_gib * 2**30
        if needed > limit:
            raise UsageError(f"data.embedded_videos_gib = {self.limit_gib:g}: the embedded videos need more; raise it")
        others = [path for path in folder.iterdir() if path not in self._used]
        for path in sorted(others, key=lambda path: path.stat().st_mtime):
            if needed + sum(other.stat().st_size for other in others if other.exists()) <= limit:
                return
            path.unlink(missing_ok=True)


def embedded_in(value: object, where: str) -> object:
    """Return the video of a table's cell: bytes and {"bytes", "path"} become `Embedded`, all else stays a path."""
    content, path = value, None
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        content, path = value.get("bytes"), value.get("path")
        if content is None:
            return path
    if not isinstance(content, bytes):
        return value
    return Embedded(f"{where}: {PurePosixPath(str(path)).name}" if path else where, BytesIO(content))


def tar_rows(tars: dict[str, Path], data: Data) -> Iterator[Row]:
    """Yield a row per sample with a video of webdataset tars, by name; a sample's members follow each other."""
    suffixes = video_suffixes(data)
    for name, path in tars.items():
        try:
            with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                members = (member for member in tar if member.isreg())
                for key, group in groupby(members, lambda member: _key(member.name)):
                    yield from _sample_rows(tar, name, key, list(group), suffixes)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DataError(f"{escaped(name)}: not a readable, uncompressed tar: {escaped(str(error))}") from None


def _key(name: str) -> str:
    """Return the webdataset key: the name up to the first dot after the last slash."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _sample_rows(
    tar: tarfile.TarFile, file: str, key: str, members: list[tarfile.TarInfo], suffixes: Collection[str]
) -> Iterator[Row]:
    by_suffix = {member.name[len(key) :].lower(): member for member in members}
    videos = [member for suffix, member in by_suffix.items() if PurePosixPath(f"x{suffix}").suffix in suffixes]
    where = escaped(f"{file}/{key}")
    if not videos:
        return
    values: dict[str, object] = {}
    try:
        for suffix in (".json", ".txt"):
            if member := by_suffix.get(suffix):
                content = _text(tar, member, MAX_JSON_BYTES if suffix == ".json" else 4 * MAX_CAPTION_BYTES)
                found = json.loads(content) if suffix == ".json" else {"text": " ".join(content.split())}
                values |= found if isinstance(found, dict) else {}
    except (ValueError, RecursionError, DataError) as error:
        yield Row(where, key, error=f"its caption: {escaped(str(error))}")
        return
    caption = next((values[name] for name in CAPTION_NAMES if values.get(name)), None)
    options = {name: values[name] for name in OPTIONAL_COLUMNS if name in values}
    for member in videos:
        stream = tar.extractfile(member)
        assert stream is not None, "a regular member has a content"
        video = Embedded(f"{file}/{member.name}", stream)
        yield Row(where, video, caption, options)


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo, limit: int) -> str:
    if member.size > limit:
        raise DataError(f"{member.name} is {member.size:,} bytes; the limit is {limit:,}")
    stream = tar.extractfile(member)
    return stream.read().decode("utf-8-sig") if stream else ""

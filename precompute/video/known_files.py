"""What files hold, remembered from run to run: an opt-in, so that a start need not read the whole data set again.

One file of JSON lines in the user's cache folder, since marks belong to a machine. A file is known by its mark: other
bytes under the same device, inode, size and times would be missed. A line that is damaged, or written by another
version of what reads files, is no line.
"""

import json
import stat
import zlib
from array import array
from base64 import b64decode, b64encode
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from precompute.video.probe import MAX_FRAMES, FileMark, Probe, Probed, mark_of
from shared.cache.storage import LocalStorage, user_folder
from shared.fingerprint import key_of

FILE = "files.jsonl"
FILE_BYTES = 512 * 2**20
"""The oldest lines go when there are more: about a million files of ten seconds."""
LINE_BYTES = 2**20
READER = f"1 av {version('av')}"
"""Names what `probe` finds out and how; changing that means changing the name."""


class Remembered:
    """The lines of one file, by mark; read when made, written by `save`."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or user_folder()
        self._lines = dict(_read(self._folder / FILE))
        self._new: dict[FileMark, bytes] = {}

    def mark(self, path: Path) -> FileMark | None:
        """The mark that the file at `path` has now, if it is known by it."""
        try:
            status = path.stat()
        except OSError:  # whoever reads it will say so
            return None
        found = mark_of(status)
        return found if stat.S_ISREG(status.st_mode) and found in self._lines else None

    def probed(self, mark: FileMark) -> Probed:
        """What the file of that mark holds."""
        found = _parse(self._lines[mark])
        assert found is not None, "lines are checked when they are read"
        return found

    def add(self, found: Probed) -> None:
        """Remember it; nothing is written yet."""
        line = _line(found)
        if len(line) <= LINE_BYTES:
            self._new[found.probe.mark] = line

    def save(self) -> None:
        """Write what is new beside what others have written meanwhile; raises as `LocalStorage.publish`."""
        if self._new:
            lines = list((dict(_read(self._folder / FILE)) | self._new).values())
            too_many = sum(size > FILE_BYTES for size in accumulate(len(line) for line in reversed(lines)))
            LocalStorage(str(self._folder)).publish(FILE, b"".join(lines[too_many:]), replace=True)


def _read(file: Path) -> Iterator[tuple[FileMark, bytes]]:
    if not file.is_file():
        return
    with file.open("rb") as stream:
        for line in iter(lambda: stream.readline(LINE_BYTES + 1), b""):
            found = _parse(line)
            if found is not None:
                yield found.probe.mark, line


def _line(found: Probed) -> bytes:
    steps = array("q", (later - earlier for earlier, later in pairwise([0, *found.timestamps_us])))
    body: dict[str, Any] = {
        "probe": asdict(found.probe),
        "steps": b64encode(zlib.compress(steps.tobytes())).decode("ascii"),
    }
    return json.dumps({"body": body, "check": key_of([READER, body])}).encode() + b"\n"


def _parse(line: bytes) -> Probed | None:
    """None for a line that is not as it was written."""
    try:
        entry: dict[str, Any] = json.loads(line)
        body = entry["body"]
        if entry["check"] != key_of([READER, body]):
            return None
        steps = array("q", zlib.decompressobj().decompress(b64decode(body["steps"]), 8 * MAX_FRAMES))
        return Probed(Probe(**{**body["probe"], "mark": tuple(body["probe"]["mark"])}), array("q", accumulate(steps)))
    except (ValueError, KeyError, TypeError, RecursionError, zlib.error):
        return None

"""Probes of files, kept from run to run in one SQLite database per user: an opt-in against reading all data again.

A file is known by its mark: other bytes under the same device, inode, size and times would be missed.
"""

import hashlib
import json
import sqlite3
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from itertools import accumulate, pairwise
from pathlib import Path

from shared.atomic_files import user_folder
from shared.console import say
from shared.media.probe import Probed, mark_of, parse_probe

FILE = "files.sqlite"
MAX_FILES = 1_000_000
LOCKED_SECONDS = 30.0
READER = f"3 av {version('av')}"
"""Names the facts that `probe` finds and the way it finds them; a change of either needs another name."""


class KnownFiles:
    """The database. A failure costs a warning and no work; a damaged database is replaced by an empty one."""

    def __init__(self, folder: Path | None = None) -> None:
        self._path = (folder or user_folder()) / FILE
        self._new: list[tuple[str, bytes]] = []
        self._database: sqlite3.Connection | None = None
        with self._warning_on_failure():
            self._connect()

    def find(self, path: Path) -> Probed | None:
        """Return the content of the file at `path`, None unless a file with its present mark was saved."""
        try:
            mark = str(mark_of(path.stat()))
        except OSError:  # the probe gives the reason
            return None
        with self._warning_on_failure():
            if self._database:
                statement = "SELECT CAST(content AS BLOB) FROM files WHERE mark = ?"
                for (content,) in self._database.execute(statement, (mark,)):
                    if content and content[:32] == _digest(content[32:]):
                        fields, steps = json.loads(zlib.decompress(content[32:]))
                        return Probed(parse_probe(fields), array("q", accumulate(steps)))
        return None

    def add(self, found: Probed) -> None:
        """Keep a probe for `save`."""
        steps = [later - earlier for earlier, later in pairwise([0, *found.timestamps_us])]
        content = zlib.compress(json.dumps([asdict(found.probe), steps]).encode())
        self._new.append((str(found.probe.mark), _digest(content) + content))

    def save(self) -> None:
        """Write the added probes, drop the oldest beyond `MAX_FILES` and close the database."""
        with self._warning_on_failure():
            if self._database:
                with self._database as writing:
                    writing.executemany("INSERT OR REPLACE INTO files VALUES (?, ?)", self._new)
                    writing.execute("DELETE FROM files WHERE rowid <= (SELECT max(rowid) FROM files) - ?", (MAX_FILES,))
        if self._database:
            self._database.close()

    def _connect(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(self._path, timeout=LOCKED_SECONDS)
        self._database.execute("CREATE TABLE IF NOT EXISTS files (mark TEXT PRIMARY KEY, content BLOB)")

    @contextmanager
    def _warning_on_failure(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError, OSError) as error:
            say(f"warning: precompute.remember_files: {self._path}: {error}; files are read again")
            self._database = None
            if not isinstance(error, sqlite3.OperationalError | OSError):  # damaged, neither locked nor read-only
                self._path.unlink(missing_ok=True)
                self._connect()


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(READER.encode() + content).digest()

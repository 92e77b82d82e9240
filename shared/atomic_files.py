"""Write local files whole or not at all."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp-"
"""Prefix of unfinished files. Readers ignore them, and no process deletes another one's."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` at the end, durably; an exception leaves `path` unchanged."""
    pending = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        yield pending
        sync_file(pending)
        pending.replace(path)
        sync_folder(path.parent)
    finally:
        pending.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Flush a file to disk (fsync)."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make the folder and its missing parents, each durable in its parent."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def user_folder() -> Path:
    """Return the folder for what this machine can make again: local copies, marks of files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "precog"

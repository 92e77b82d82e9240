"""Where cache files live, and the one way they are written: whole or not at all, first writer wins.

A `Storage` names files by posix paths relative to its root. On a local folder a file is published by unique temporary
-> fsync -> link to its final name (no clobber) -> fsync of the folder; `shared/cache/remote.py` has the other kind.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from shared.errors import CacheError, UsageError

TEMPORARY = ".tmp-"
"""Prefix of files in the making; readers never look at them and nobody deletes another writer's."""


class Storage(Protocol):
    """A cache, wherever it is; `str` is its root, for messages."""

    def path(self, name: str) -> Path:
        """A local path of the file, for mapping; a remote file is fetched whole first."""

    def names(self, folder: str, suffix: str) -> list[str]:
        """Sorted names of the files below `folder` that end with `suffix`; [] if there is no such folder."""

    def read(self, name: str, *, limit_bytes: int) -> bytes:
        """The whole file; raises `CacheError` if it is missing or larger than `limit_bytes`."""

    def read_part(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on; raises `CacheError` if they are not there."""

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""

    def size(self, name: str) -> int | None:
        """Bytes, or None if there is no such file."""

    def free_bytes(self) -> int | None:
        """What can still be written, or None where nobody can tell."""

    def copies_bytes(self) -> int | None:
        """What the local copies behind `path` may take together, or None where it needs none."""

    def set_aside(self, name: str) -> None:
        """Rename a file to `<name>.damaged`, out of every reader's sight, if it is there.

        Raises `CacheError` if that cannot be.
        """

    def publish(self, name: str, content: bytes, *, replace: bool = False) -> bool:
        """Write a file whole or not at all; False if another writer's is already there (it stays unless `replace`).

        Raises `CacheError` if the disk is full or a remote cannot be written.
        """


def open_storage(cache: str, *, local_cache_gib: float = 50, local_folder: Path | None = None) -> Storage:
    """The storage of `precompute.cache`: a folder, or a URL that fsspec knows.

    `local_cache_gib` bounds the copies of remote shards in `local_folder` (the user's cache folder unless given).
    Raises `UsageError` if nothing here can open the URL, or a file is in the folder's place.
    """
    if cache.startswith("file://"):
        cache = cache.removeprefix("file://")
        if not cache.startswith("/"):
            raise UsageError(f"precompute.cache = 'file://{cache}': write it as file:///folder or as a plain folder")
    if "://" not in cache:
        folder = Path(cache).absolute()
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir():
            raise UsageError(f"precompute.cache = {cache!r}: '{there}' is a file, not a folder")
        return LocalStorage(cache)
    from shared.cache.remote import RemoteStorage, open_filesystem

    filesystem, root = open_filesystem(cache)
    return RemoteStorage(filesystem, root, cache, int(local_cache_gib * 2**30), local_folder)


def user_folder() -> Path:
    """What is kept from run to run on this machine and can be had again: local copies, marks of files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "precog"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what becomes `path` if all goes well; nobody sees half a file, and none is left."""
    pending = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        yield pending
        pending.replace(path)
    finally:
        pending.unlink(missing_ok=True)


class LocalStorage:
    """A cache folder on a local or shared file system."""

    def __init__(self, root: str) -> None:
        self.root = Path(root)

    def __str__(self) -> str:
        return str(self.root)

    def path(self, name: str) -> Path:
        return self.root / name

    def names(self, folder: str, suffix: str) -> list[str]:
        found = (self.root / folder).rglob(f"*{suffix.rpartition('/')[2]}")
        names = (path.relative_to(self.root).as_posix() for path in found if not path.name.startswith(TEMPORARY))
        return sorted(name for name in names if name.endswith(suffix))

    def read(self, name: str, *, limit_bytes: int) -> bytes:
        path = self.root / name
        try:
            with path.open("rb") as file:
                content = file.read(limit_bytes + 1)
        except OSError as error:
            raise CacheError(f"{path}: cannot be read ({os.strerror(error.errno or 0)})") from None
        if len(content) > limit_bytes:
            raise CacheError(f"{path}: larger than {limit_bytes} bytes, which no such file is")
        return content

    def read_part(self, name: str, offset: int, length: int) -> bytes:
        path = self.root / name
        try:
            with path.open("rb") as file:
                file.seek(offset)
                content = file.read(length)
        except OSError as error:
            raise CacheError(f"{path}: cannot be read ({os.strerror(error.errno or 0)})") from None
        if len(content) != length:
            raise CacheError(f"{path}: ends before byte {offset + length}")
        return content

    def exists(self, name: str) -> bool:
        return (self.root / name).is_file()

    def size(self, name: str) -> int | None:
        try:
            return (self.root / name).stat().st_size
        except FileNotFoundError:
            return None

    def free_bytes(self) -> int | None:
        there = next(folder for folder in (self.root.absolute(), *self.root.absolute().parents) if folder.is_dir())
        return shutil.disk_usage(there).free

    def copies_bytes(self) -> int | None:
        return None

    def set_aside(self, name: str) -> None:
        path = self.root / name
        try:
            path.replace(path.with_name(f"{path.name}.damaged"))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise CacheError(f"{path}: cannot be set aside ({error.strerror})") from error

    def publish(self, name: str, content: bytes, *, replace: bool = False) -> bool:
        final = self.root / name
        temporary = final.with_name(f"{TEMPORARY}{secrets.token_hex(8)}-{final.name}")
        try:
            _make_folder(final.parent)
            with temporary.open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            published = _move(temporary, final, replace)
            sync_folder(final.parent)
            return published
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CacheError(f"{final}: the disk is full; free some space and run the same command again") from None
            where = f": {error.filename}" if error.filename else ""
            raise CacheError(f"{final}: cannot be written ({error.strerror}{where})") from error
        finally:
            with suppress(OSError):  # it may never have been there, for whatever reason
                temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable; file systems that cannot are left alone."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    """Make the folder and its parents where they are missing, each durable in its own parent."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def _move(temporary: Path, final: Path, replace: bool) -> bool:
    """Give the file its final name; False if another writer was first."""
    if replace:
        temporary.replace(final)
        return True
    try:
        os.link(temporary, final)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        if final.exists():  # no hard links here; equal names hold equal bytes, so the small race is harmless
            return False
        temporary.rename(final)
    return True

"""Storage of cache files: every file is written whole or not at all, and the first writer wins.

A `Storage` names files by posix paths relative to its root; `str` of it is the root. `LocalStorage` publishes a file by
unique temporary -> fsync -> link to its final name (no clobber) -> fsync of the folder.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from shared.atomic_files import TEMPORARY, make_folder, sync_file, sync_folder
from shared.cache.remote import Entry, RemoteStorage, finished, open_filesystem
from shared.errors import CacheError, UsageError
from shared.regular_files import open_regular

VERIFY = "run `precog cache verify --repair`, then precompute again"
"""The remedy for a damaged file of a cache."""


class LocalStorage:
    """A cache folder on a local or shared file system."""

    limit_bytes = None
    """Limit for local copies of remote files; None if there are no copies."""

    def __init__(self, root: str) -> None:
        self.root = Path(root)

    def __str__(self) -> str:
        return str(self.root)

    def path(self, name: str) -> Path:
        """Return the path of a file."""
        return self.root / name

    def local_tar(self, name: str, size: int) -> Path:
        """Return a local path of a tar of `size` bytes; a remote tar is fetched whole first."""
        assert size > 0
        return self.path(name)

    def entries(self, folder: str) -> dict[str, Entry]:
        """Return the files below `folder`, sorted by name; raises `CacheError` if it cannot be listed."""

        def refuse(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise CacheError(f"{error.filename}: cannot be listed ({error.strerror}); check its permissions")

        found = {}
        for parent, _, names in os.walk(self.root / folder, onerror=refuse):
            for path in (Path(parent, name) for name in names):
                with suppress(FileNotFoundError):  # renamed meanwhile
                    status = path.stat()
                    found[path.relative_to(self.root).as_posix()] = Entry(status.st_size, status.st_mtime)
        return dict(sorted(found.items()))

    def files(self, folder: str) -> dict[str, int]:
        """Return name -> size in bytes of the finished files below `folder`, sorted by name."""
        return finished(self.entries(folder))

    def read(self, name: str, *, limit_bytes: int) -> bytes:
        """Return the whole file; raises `CacheError` if it is missing or larger than `limit_bytes`."""
        with self._open(name) as file:
            content = file.read(limit_bytes + 1)
        if len(content) > limit_bytes:
            raise CacheError(f"{self.path(name)}: more than the limit of {limit_bytes} bytes; delete this file")
        return content

    def read_part(self, name: str, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on; raises `CacheError` if the file ends before."""
        with self._open(name) as file:
            file.seek(offset)
            content = file.read(length)
        if len(content) != length:
            raise CacheError(f"{self.path(name)}: ends before byte {offset + length}; {VERIFY}")
        return content

    def _open(self, name: str) -> FileIO:
        with self._error(name, "cannot be read", VERIFY):
            return open_regular(self.path(name), through_links=True)

    def size(self, name: str) -> int | None:
        """Return the size in bytes, or None if there is no such file."""
        path = self.path(name)
        return path.stat().st_size if path.is_file() else None

    def free_bytes(self) -> int | None:
        """Return the bytes that can still be written, None if unknown."""
        existing = next(folder for folder in (self.root.absolute(), *self.root.absolute().parents) if folder.is_dir())
        return shutil.disk_usage(existing).free

    def set_aside(self, name: str) -> None:
        """Rename a file, if it exists, to `<name>.damaged`, which no reader looks at. Raises `CacheError`."""
        path = self.path(name)
        with self._error(name, "cannot be renamed", "check its permissions"), suppress(FileNotFoundError):
            path.replace(path.with_name(f"{path.name}.damaged"))

    def remove(self, name: str) -> None:
        """Delete a file if it exists; raises `CacheError`."""
        with self._error(name, "cannot be deleted", "check its permissions"):
            self.path(name).unlink(missing_ok=True)

    def publish(self, name: str, content: bytes, *, replace: bool = False) -> bool:
        """Write a file whole; return False if the name is taken, which keeps its file unless `replace`.

        Raises `CacheError` if the disk is full or the file cannot be written.
        """
        with self.unfinished(name) as temporary:
            with temporary.open("r+b") as stream:
                stream.write(content)
            return self.publish_file(temporary, name, replace=replace)

    @contextmanager
    def unfinished(self, name: str) -> Iterator[Path]:
        """Yield the path of a new, empty file, to be filled and published as `name` or beside; removed at the end."""
        final = self.path(name)
        temporary = final.with_name(f"{TEMPORARY}{secrets.token_hex(8)}-{final.name}")
        try:
            with self.writing(name):
                make_folder(final.parent)
                temporary.open("xb").close()
                yield temporary
        finally:
            with suppress(OSError):  # the temporary may not exist
                temporary.unlink()

    def publish_file(self, temporary: Path, name: str, *, replace: bool = False) -> bool:
        """Make a file of `unfinished` durable and give it its name, as `publish`."""
        final = self.path(name)
        with self.writing(name):
            sync_file(temporary)
            published = _rename(temporary, final, replace=replace)
            sync_folder(final.parent)
            return published

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Raise an `OSError` of the body as a `CacheError` naming the file."""
        with self._error(name, "cannot be written", "check its permissions"):
            yield

    def fetch(self, name: str, path: Path) -> None:
        """Copy a file to `path`, which is overwritten; raises `CacheError`."""
        with self._open(name) as source, path.open("r+b") as copy:
            shutil.copyfileobj(source, copy)

    @contextmanager
    def _error(self, name: str, what: str, advice: str) -> Iterator[None]:
        """Raise an `OSError` of the body as a `CacheError` of one line."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                what, advice = "the disk is full", "free some space and run the same command again"
            other = f": {error.filename}" if error.filename not in (None, str(self.path(name))) else ""
            raise CacheError(f"{self.path(name)}: {what} ({error.strerror}{other}); {advice}") from error


def _rename(temporary: Path, final: Path, *, replace: bool) -> bool:
    """Give a finished file its final name; return False if another file already has it and `replace` is off."""
    if not replace:
        try:
            os.link(temporary, final)
            return True
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
            if final.exists():  # no hard links here; equal names hold equal bytes, so this race is harmless
                return False
    temporary.replace(final)
    return True


Storage = LocalStorage | RemoteStorage


def open_storage(cache: str, *, local_cache_gib: float = 50, local_folder: Path | None = None) -> Storage:
    """Open `precompute.cache`: a folder, or a URL that fsspec knows.

    `local_cache_gib` bounds the copies of remote shards in `local_folder` (default: the user's cache folder).
    Raises `UsageError` if the URL cannot be opened, or the folder is a file.
    """
    if cache.startswith("file://"):
        cache = cache.removeprefix("file://")
        if not cache.startswith("/"):
            raise UsageError(f"precompute.cache = 'file://{cache}': not absolute; write file:///folder or a folder")
    if "://" not in cache:
        folder = Path(cache).absolute()
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        if not existing.is_dir():
            raise UsageError(f"precompute.cache = {cache!r}: '{existing}' is a file; choose a folder")
        return LocalStorage(cache)
    filesystem, root = open_filesystem(cache)
    return RemoteStorage(filesystem, root, cache, int(local_cache_gib * 2**30), local_folder)

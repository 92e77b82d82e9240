"""A cache behind fsspec (s3://, gs://, hf://, memory://): objects are written whole and read whole or by range.

An object store shows an upload under its final name only when it is complete, so there are no temporary names. Where a
torn object is visible all the same, it has no receipt. Shards are fetched whole into a bounded local folder.
"""

import contextlib
import math
import os
import secrets
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from shared.atomic_files import TEMPORARY, user_folder
from shared.errors import CacheError, PrecogError, UsageError, one_line
from shared.fingerprint import sha256_file

UNSUITABLE = ("http", "https", "data", "zip", "tar", "filecache", "simplecache", "blockcache", "cached", "reference")
"""fsspec protocols that cannot be written, or that have a cache of their own."""
ABANDONED_SECONDS = 24 * 60 * 60.0
"""An unfinished copy older than this belongs to a process that was killed."""


KNOWN: dict[tuple[str, str, str], bytes] = {}
"""Receipts that this process has read, compressed, by cache, name and version: its passes fetch each once."""


class Entry(NamedTuple):
    """A file in a cache."""

    size: int
    """In bytes."""
    modified: float
    """Seconds since 1970; infinite where the driver does not say, so that the file never counts as old."""


def finished(entries: Mapping[str, Entry]) -> dict[str, int]:
    """Return name -> size of the files that are no writer's temporary."""
    return {name: entry.size for name, entry in entries.items() if not is_temporary(name)}


def is_temporary(name: str) -> bool:
    """Return whether a file is the unfinished one of a writer that runs or was killed."""
    return PurePosixPath(name).name.startswith(TEMPORARY)


def _modified(about: Mapping[str, Any]) -> float:
    """Return the time that a driver's listing states, under the driver's own name for it."""
    time = next((about[name] for name in ("LastModified", "mtime", "updated", "created") if about.get(name)), math.inf)
    return time.timestamp() if isinstance(time, datetime) else float(time)


def open_filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system and the root's path in it; raises `UsageError` naming what is missing."""
    import fsspec

    protocol = url.partition("://")[0]
    if "::" in url or protocol in UNSUITABLE:
        raise UsageError(f"precompute.cache = {url!r}: cannot be written; give a folder or a plain URL such as s3://")
    try:
        filesystem, root = fsspec.core.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)
    except ImportError as error:
        extra = "`make setup EXTRAS=\"s3\"` or `pip install -e '.[s3]'` from the clone"
        advice = f"run {extra}" if protocol in ("s3", "s3a") else str(error).splitlines()[0]
        raise UsageError(f"precompute.cache = {url!r}: no driver for {protocol}:// is installed; {advice}") from None
    except ValueError as error:
        raise UsageError(f"precompute.cache = {url!r}: {error}") from None
    return filesystem, root.rstrip("/")


class RemoteStorage:
    """A cache in an object store, with the methods of `LocalStorage`.

    Errors of the driver become `CacheError` in one line that names the object.
    """

    def __init__(self, filesystem: Any, root: str, url: str, limit_bytes: int, local_folder: Path | None) -> None:
        self._filesystem = filesystem
        self._root = root
        self._url = url.rstrip("/")
        self.limit_bytes = limit_bytes
        self._local = local_folder or user_folder()
        self._versions: dict[str, str] = {}
        """Name -> size, time and tag in the newest listing."""

    def __str__(self) -> str:
        return self._url

    def local_tar(self, name: str, size: int) -> Path:
        local = self._local / f"{name.partition('/')[0]}-{Path(name).name}"  # a tar is named by its content
        with contextlib.suppress(FileNotFoundError):
            if local.stat().st_size == size:
                os.utime(local)  # the least recently used copies are deleted first
                return local
        self._make_room(size)
        with self.unfinished(name) as temporary:
            self.fetch(name, temporary)
            if sha256_file(temporary) != PurePosixPath(name).stem:
                raise CacheError(f"{self}/{name}: damaged; run `precog cache verify --repair`, then precompute again")
            temporary.replace(local)
        return local

    def fetch(self, name: str, path: Path) -> None:
        with self._driver(name, "cannot be fetched"):
            self._filesystem.get_file(self._at(name), str(path))

    def entries(self, folder: str) -> dict[str, Entry]:
        with self._driver(folder, "cannot be listed"):
            try:
                found = self._filesystem.find(self._at(folder), detail=True)
            except FileNotFoundError:
                return {}
        entries = {path.removeprefix(self._root).lstrip("/"): about for path, about in found.items()}
        self._versions |= {
            name: f"{about['size']} {_modified(about)} {about.get('ETag')}"
            for name, about in entries.items()
            if name.startswith(("latents/", "prompts/")) and name.endswith(".json")
        }
        return {name: Entry(about["size"], _modified(about)) for name, about in sorted(entries.items())}

    def files(self, folder: str) -> dict[str, int]:
        return finished(self.entries(folder))

    def read(self, name: str, *, limit_bytes: int) -> bytes:
        known = self._url, name, self._versions.get(name, "")
        if known in KNOWN:
            return zlib.decompress(KNOWN[known])
        with self._driver(name, "cannot be read"):
            content: bytes = self._filesystem.cat_file(self._at(name), start=0, end=limit_bytes + 1)
            if len(content) > limit_bytes:
                raise CacheError(f"{self}/{name}: more than the limit of {limit_bytes} bytes; delete this object")
        if name in self._versions:
            KNOWN[known] = zlib.compress(content, 1)
        return content

    def read_part(self, name: str, offset: int, length: int) -> bytes:
        with self._driver(name, "cannot be read"):
            content: bytes = self._filesystem.cat_file(self._at(name), start=offset, end=offset + length)
            if len(content) != length:
                raise CacheError(f"{self}/{name}: ends before byte {offset + length}")
        return content

    def size(self, name: str) -> int | None:
        with self._driver(name, "cannot be found out"):
            try:
                size: int | None = self._filesystem.size(self._at(name))
            except FileNotFoundError:
                return None
        return size

    def free_bytes(self) -> int | None:
        return None

    def set_aside(self, name: str) -> None:
        if self.size(name) is not None:
            with self._driver(name, "cannot be renamed"):
                self._filesystem.mv(self._at(name), self._at(f"{name}.damaged"))

    def remove(self, name: str) -> None:
        with self._driver(name, "cannot be deleted"), contextlib.suppress(FileNotFoundError):
            self._filesystem.rm_file(self._at(name))

    def publish(self, name: str, content: bytes, *, replace: bool = False) -> bool:
        return self._put(name, self._filesystem.pipe_file, content, replace=replace)

    @contextlib.contextmanager
    def unfinished(self, _name: str) -> Iterator[Path]:
        self._local.mkdir(parents=True, exist_ok=True)
        temporary = self._local / f"{TEMPORARY}{secrets.token_hex(8)}"
        temporary.touch(exist_ok=False)
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def publish_file(self, temporary: Path, name: str, *, replace: bool = False) -> bool:
        def put(path: str, local: str, **options: str) -> None:
            self._filesystem.put_file(local, path, **options)

        return self._put(name, put, str(temporary), replace=replace)

    def writing(self, name: str) -> contextlib.AbstractContextManager[None]:
        return self._driver(name, "cannot be written")

    def _put(self, name: str, put: Callable[..., None], content: bytes | str, *, replace: bool) -> bool:
        self._versions.pop(name, None)
        with self._driver(name, "cannot be written"):
            if replace:
                put(self._at(name), content)
                return True
            try:
                put(self._at(name), content, mode="create")
            except FileExistsError:
                return False
            except NotImplementedError:  # equal names hold equal bytes, so the race of look and write is harmless
                if self.size(name) is not None:
                    return False
                put(self._at(name), content)
        return True

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _driver(self, name: str, what: str) -> Iterator[None]:
        try:
            yield
        except PrecogError:
            raise
        except Exception as error:  # drivers raise whatever the libraries below them raise
            raise CacheError(f"{self}/{name}: {what} ({one_line(error)}); run the same command again") from error

    def _make_room(self, size: int) -> None:
        """Delete the least recently opened copies until `size` fits, of latents first; an open copy stays readable.

        Prompts are drawn from all their shards at any time, latents from a window of theirs.
        """
        for path in self._local.glob(f"{TEMPORARY}*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()
        copies = []
        for path in self._local.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process deletes copies too
                about = path.stat()
                copies.append((path.name.startswith("prompts-"), about.st_mtime_ns, about.st_size, path))
        excess = size + sum(copy_size for *_, copy_size, _ in copies) - self.limit_bytes
        for *_, copy_size, path in sorted(copies):
            if excess > 0:
                path.unlink(missing_ok=True)
                excess -= copy_size

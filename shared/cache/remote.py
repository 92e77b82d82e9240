"""A cache behind fsspec (s3://, gs://, hf://, memory://): objects are written whole and read whole or by range.

An object store shows an upload under its final name only when it is complete, so there are no temporary names. Where a
torn object is visible all the same, it has no receipt. Shards are fetched whole into a bounded local folder.
"""

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.atomic_files import TEMPORARY, user_folder
from shared.errors import CacheError, UsageError, one_line
from shared.fingerprint import key_of

UNSUITABLE = ("http", "https", "data", "zip", "tar", "filecache", "simplecache", "blockcache", "cached", "reference")
"""fsspec protocols that cannot be written, or that have a cache of their own."""
ABANDONED_SECONDS = 24 * 60 * 60.0
"""An unfinished copy older than this belongs to a process that was killed."""


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
        self._limit_bytes = limit_bytes
        self._local = local_folder or user_folder()

    def __str__(self) -> str:
        return self._url

    def path(self, name: str) -> Path:
        with self._driver(name, "cannot be fetched"):
            version = key_of([self._url, name, self._filesystem.ukey(self._at(name))])
            local = self._local / f"{name.partition('/')[0]}-{version}{Path(name).suffix}"
            if local.is_file():
                os.utime(local)  # the least recently used copies are deleted first
                return local
            self._local.mkdir(parents=True, exist_ok=True)
            self._make_room(self._filesystem.size(self._at(name)) or 0)
            temporary = local.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
            try:
                self._filesystem.get_file(self._at(name), str(temporary))
                temporary.replace(local)
            finally:
                temporary.unlink(missing_ok=True)
        return local

    def files(self, folder: str) -> dict[str, int]:
        with self._driver(folder, "cannot be listed"):
            try:
                found = self._filesystem.find(self._at(folder), detail=True)
            except FileNotFoundError:
                return {}
        sizes = {path.removeprefix(self._root).lstrip("/"): about["size"] for path, about in found.items()}
        return dict(sorted(sizes.items()))

    def read(self, name: str, *, limit_bytes: int) -> bytes:
        with self._driver(name, "cannot be read"):
            content: bytes = self._filesystem.cat_file(self._at(name), start=0, end=limit_bytes + 1)
            if len(content) > limit_bytes:
                raise CacheError(f"{self}/{name}: more than the limit of {limit_bytes} bytes; delete this object")
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

    def copies_bytes(self) -> int | None:
        return self._limit_bytes

    def set_aside(self, name: str) -> None:
        if self.size(name) is not None:
            with self._driver(name, "cannot be renamed"):
                self._filesystem.mv(self._at(name), self._at(f"{name}.damaged"))

    def publish(self, name: str, content: bytes, *, replace: bool = False) -> bool:
        with self._driver(name, "cannot be written"):
            if replace:
                self._filesystem.pipe_file(self._at(name), content)
                return True
            try:
                self._filesystem.pipe_file(self._at(name), content, mode="create")
            except FileExistsError:
                return False
            except NotImplementedError:  # equal names hold equal bytes, so the race of look and write is harmless
                if self.size(name) is not None:
                    return False
                self._filesystem.pipe_file(self._at(name), content)
        return True

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _driver(self, name: str, what: str) -> Iterator[None]:
        try:
            yield
        except CacheError:
            raise
        except Exception as error:  # drivers raise whatever the libraries below them raise
            raise CacheError(f"{self}/{name}: {what} ({one_line(error)}); run the same command again") from error

    def _make_room(self, size: int) -> None:
        """Delete the least recently opened copies until `size` fits, of latents first; a mapped copy stays readable.

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
        excess = size + sum(copy_size for *_, copy_size, _ in copies) - self._limit_bytes
        for *_, copy_size, path in sorted(copies):
            if excess > 0:
                path.unlink(missing_ok=True)
                excess -= copy_size

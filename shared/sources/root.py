"""Names of a data set's files -> regular files in the data root, whatever their spelling."""

import os
import re
import stat
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from shared.errors import DataError
from shared.sources.tables import escaped

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


@dataclass(frozen=True, slots=True)
class DataRoot:
    """The folder that every path stays inside; with `follow_links` its links may lead out."""

    folder: Path
    """Absolute, free of links."""
    follow_links: bool = False
    _folders: dict[str, Path | None] = field(default_factory=dict, compare=False)
    """Name of a folder -> its path free of links, None if that leaves the data root."""

    def find(self, name: str) -> Path:
        """Return the regular file `name`, free of links itself.

        Absolute names outside, "..", NUL and lone surrogates are refused before the file system is asked. White space
        around a name is no part of it where no such file exists, and Unicode forms are equal. Nothing is opened. Raise
        `DataError` with the reason, without the row.
        """
        given, name = name, name.removeprefix(f"{self.folder}/")
        if plain := self._plain(name):
            return plain
        shown = f"path '{escaped(given)}'"
        for refused, reason in (
            (not name.strip(), "is empty"),
            ("\0" in name, "has a control character"),
            (re.search("[\ud800-\udfff]", name), "is not Unicode text; rename it"),
            (name.startswith("/"), "is absolute; write it relative to the data root"),
            (".." in PurePosixPath(name).parts, "has '..'; write it relative to the data root"),
        ):
            if refused:
                raise DataError(f"{shown} {reason}" if name.strip() else "the video's path is empty")
        path = self._spelled(name)
        if not os.path.lexists(path) and name != name.strip():
            path = self._spelled(name.strip())
        try:
            found = path.resolve()
            if not found.is_relative_to(self.folder) and not self.follow_links:
                raise DataError(f"{shown} is a link that leaves the data root; data.follow_links=true takes it")
            mode = found.lstat().st_mode
        except FileNotFoundError:
            raise DataError(f"{shown} {_why_missing(name, path)}") from None
        except OSError as error:
            raise DataError(f"{shown} cannot be read: {error.strerror}") from None
        except RuntimeError:  # raised by Python 3.11 and 3.12 for links in a circle
            raise DataError(f"{shown} is a link that leads to itself") from None
        if not stat.S_ISREG(mode):
            kinds = {stat.S_IFDIR: "a folder, not a file", stat.S_IFLNK: "a link that leads to itself"}
            raise DataError(f"{shown} is {kinds.get(stat.S_IFMT(mode), 'a device, socket or named pipe, not a file')}")
        return found

    def _plain(self, name: str) -> Path | None:
        """Return the regular file of that spelling in a folder that was resolved before, None for a closer look."""
        parent, _, last = name.rpartition("/")
        if not name.isprintable() or name.startswith("/") or ".." in name:
            return None
        try:
            if parent not in self._folders:
                folder = (self.folder / parent).resolve()
                self._folders[parent] = folder if self.follow_links or folder.is_relative_to(self.folder) else None
            path = (found := self._folders[parent]) and found / last
            return path if path and stat.S_ISREG(path.lstat().st_mode) else None
        except (OSError, RuntimeError):
            return None

    def _spelled(self, name: str) -> Path:
        """Return the path of `name` as the file system spells it; names are compared in composed form (NFC)."""
        path = self.folder
        for part in PurePosixPath(name).parts:
            child = path / part
            if not part.isascii() and not os.path.lexists(child) and path.is_dir():
                inside = self.follow_links or path.resolve().is_relative_to(self.folder)
                found = list(path.iterdir()) if inside else []
                child = next((other for other in found if composed(other.name) == composed(part)), child)
            path = child
        return path


def composed(name: str) -> str:
    """Return the name in Unicode's composed form, NFC; file systems and editors differ in the form."""
    return unicodedata.normalize("NFC", name)


def _why_missing(name: str, path: Path) -> str:
    """Return why the file system has no file of this name."""
    if path.is_symlink():
        return "not found: a link to a missing file"
    if any(ord(char) < 32 or 127 <= ord(char) < 160 for char in name):
        return "not found: it has a control character"
    if "\\" in name:
        return "not found: it has a backslash; write forward slashes"
    if _SCHEME.match(name):
        return "not found: it starts with a URL scheme or drive letter; write it relative to the data root"
    return "not found in the data root"

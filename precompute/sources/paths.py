"""The rule for names that come from the user's data: a regular file inside the data root, or an error."""

import re
import stat
from pathlib import Path, PurePosixPath

from shared.errors import DataError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_MAX_SHOWN = 200


def escaped(text: str) -> str:
    """`text` as one printable line: control, bidi and other invisible characters as escapes, a long tail cut off."""
    shown = text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in shown)


def resolve_inside(root: Path, name: str) -> Path:
    """The regular file `name` below `root` (absolute, without links), free of links itself.

    Only plain relative names with forward slashes: "..", absolute names, drive letters, UNC names, URL schemes,
    control characters and lone surrogates are refused before the file system is asked. Links are followed; what
    they lead to must lie in the root. Nothing is opened. Raises `DataError` with the reason, without the row.
    """
    shown = f"'{escaped(name)}'"
    if not name.strip():
        raise DataError("the video's path is empty")
    if any(ord(char) < 32 or 127 <= ord(char) < 160 for char in name):
        raise DataError(f"path {shown} has a control character")
    if any("\ud800" <= char <= "\udfff" for char in name):
        raise DataError(f"path {shown} is not Unicode text")
    if "\\" in name:
        raise DataError(f"path {shown} has a backslash; write forward slashes")
    if _SCHEME.match(name):
        raise DataError(f"path {shown} starts with a URL scheme or drive letter; write it relative to the data root")
    if name.startswith("/"):
        raise DataError(f"path {shown} is absolute; write it relative to the data root")
    if ".." in PurePosixPath(name).parts:
        raise DataError(f"path {shown} has '..'; write it relative to the data root")
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise DataError(f"path {shown} is a link that leaves the data root")
        mode = path.lstat().st_mode
    except FileNotFoundError:
        raise DataError(f"no file {shown} in the data root") from None
    except OSError as error:
        raise DataError(f"path {shown} cannot be read: {error.strerror}") from None
    except RuntimeError:  # what Python 3.11 and 3.12 raise for links in a circle
        raise DataError(f"path {shown} is a link that leads to itself") from None
    if not stat.S_ISREG(mode):
        raise DataError(f"path {shown} is {_KINDS.get(stat.S_IFMT(mode), 'not a regular file')}, not a file")
    return path

"""The rule for names that come from the user's data: a regular file inside the data root, or a `DataError`."""

import os
import re
import stat
from pathlib import Path, PurePosixPath

from shared.errors import DataError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_MAX_SHOWN = 200


def escaped(text: str) -> str:
    """Return `text` as one short printable line: control, bidi and other invisible characters as escapes."""
    shown = text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in shown)


def expanded(path: Path | str) -> Path:
    """Replace a leading `~` by the home folder; the `~` of an unknown user stays."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def resolve_inside(root: Path, name: str) -> Path:
    """Return the regular file `name` below `root` (absolute, without links), free of links itself.

    Only plain relative names with forward slashes pass: "..", absolute names, drive letters, UNC names, URL schemes,
    control characters and lone surrogates are refused before the file system is asked. Links are followed; their
    targets must lie in the root. Nothing is opened. Raise `DataError` with the reason, without the row.
    """
    if not name.strip():
        raise DataError("the video's path is empty")
    shown = f"path '{escaped(name)}'"
    for refused, reason in (
        (any(ord(char) < 32 or 127 <= ord(char) < 160 for char in name), "has a control character"),
        (any("\ud800" <= char <= "\udfff" for char in name), "is not Unicode text"),
        ("\\" in name, "has a backslash; write forward slashes"),
        (_SCHEME.match(name), "starts with a URL scheme or drive letter; write it relative to the data root"),
        (name.startswith("/"), "is absolute; write it relative to the data root"),
        (".." in PurePosixPath(name).parts, "has '..'; write it relative to the data root"),
    ):
        if refused:
            raise DataError(f"{shown} {reason}")
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise DataError(f"{shown} is a link that leaves the data root")
        mode = path.lstat().st_mode
    except FileNotFoundError:
        raise DataError(f"{shown} not found in the data root") from None
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error.strerror}") from None
    except RuntimeError:  # raised by Python 3.11 and 3.12 for links in a circle
        raise DataError(f"{shown} is a link that leads to itself") from None
    if not stat.S_ISREG(mode):
        raise DataError(
            f"{shown} is {'a folder' if stat.S_ISDIR(mode) else 'a device, socket or named pipe'}, not a file"
        )
    return path

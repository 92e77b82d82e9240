"""Open regular files, and no FIFO, which would wait for a writer."""

import errno
import os
import stat
from io import FileIO
from pathlib import Path


def open_regular(path: Path, *, through_links: bool = False) -> FileIO:
    """Open the regular file at `path`; raise `OSError`, also for a link in the path unless `through_links`.

    So a link that was put into a path of the data root after its check is not followed.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.ENXIO, "not a regular file", str(path))
        real = Path(f"/proc/self/fd/{descriptor}")
        if not through_links and real.is_symlink() and os.readlink(real) != os.path.abspath(path):  # noqa: PTH100, PTH115
            raise OSError(errno.ESTALE, "a link was put into its path", str(path))
        return FileIO(descriptor)
    except OSError:
        os.close(descriptor)
        raise

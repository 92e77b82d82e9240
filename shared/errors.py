"""Exceptions and the exit code that each one ends the process with.

An error that a user can act on is one line: `<field or file>: <what is wrong>; <what to do>`. A bad clip is not an
error but a skip with a reason. Our own invariants are `assert`.
"""

from importlib.util import find_spec


class PrecogError(Exception):
    """An error that a user can act on; the command prints the message and exits with `exit_code`."""

    exit_code = 1


class UsageError(PrecogError):
    """A wrong command line or config value."""

    exit_code = 2


class DataError(PrecogError):
    """Clips, captions or tables that cannot be read as described."""

    exit_code = 3


class CacheError(PrecogError):
    """A cache that is outdated, damaged or made by other weights."""

    exit_code = 4


class NonFiniteError(PrecogError):
    """A loss or gradient that is not finite; the message names the clips."""

    exit_code = 5


class Preempted(PrecogError):
    """A stop by a signal; the same command continues."""

    exit_code = 75


def one_line(error: Exception) -> str:
    """Return the start of an exception's message on one line, or its type's name if there is no message."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def require_extra(module: str, option: str, extra: str) -> None:
    """Raise `UsageError` if the package `module` of this project's `extra`, needed by `option`, is not installed."""
    if find_spec(module) is None:
        raise UsageError(f"{option}: package {module} not found; run `pip install -e '.[{extra}]'` in the clone")

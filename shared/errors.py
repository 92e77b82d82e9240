"""What can go wrong, and the exit code each kind ends the process with.

A user's fault is one line: what is wrong, where, what would be right. One bad clip is not an error: it is
counted as `skipped(reason)` (precompute). Our own invariants are `assert`.
"""


class PrecogError(Exception):
    """Anything a person can act on; the command prints the message and ends with `exit_code`."""

    exit_code = 1


class UsageError(PrecogError):
    """A wrong command line or config value."""

    exit_code = 2


class DataError(PrecogError):
    """The user's clips, captions or tables are not what they claim to be."""

    exit_code = 3


class CacheError(PrecogError):
    """The cache is stale, damaged or made by other weights."""

    exit_code = 4


class NonFiniteError(PrecogError):
    """A loss or gradient is not finite; the message names the clips."""

    exit_code = 5


class Preempted(PrecogError):
    """Stopped by a signal; the same command goes on from here."""

    exit_code = 75


def one_line(error: Exception) -> str:
    """Return the start of an exception's message on one line, or its type's name if there is no message."""
    return " ".join(str(error).split())[:300] or type(error).__name__

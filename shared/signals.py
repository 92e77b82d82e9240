"""SIGTERM, SIGINT and SIGUSR1: stage 1 stops at once, stage 2 finishes its step first; both end with exit code 75."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from shared.errors import Preempted
from shared.launcher import rank

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
AGAIN_SECONDS = 3.0
"""An exception in a destructor or a callback is lost, so a stop is raised again until the work has been left."""


@contextmanager
def raise_on_signal(what_is_safe: str) -> Iterator[None]:
    """Raise `Preempted` in the main thread as soon as a signal arrives; a second signal ends the process.

    For work that loses nothing when it is killed. Enter it before heavy imports.
    """
    received = False

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal received
        if received and number != signal.SIGALRM:
            os._exit(Preempted.exit_code)
        received = True
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
        raise KeyboardInterrupt  # libraries catch Exception, and seldom this

    previous = {number: signal.signal(number, stop) for number in (*SIGNALS, signal.SIGALRM)}
    try:
        yield
    except BaseException:
        if received:
            raise _preempted(what_is_safe) from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _restore(previous)


class StopSignal:
    """A flag for work that finishes its step and saves: the first signal sets `requested`, a second one stops now."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        _restore(self._previous)

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        _restore(self._previous)
        if rank() == 0:  # the console may hold a lock that the interrupted code has taken
            os.write(2, b"precog: signal received; finishing this step and saving (a second signal stops now)\n")

    def check(self, what_is_safe: str) -> None:
        """Raise `Preempted` if a signal has arrived."""
        if self.requested:
            raise _preempted(what_is_safe)


def _restore(handlers: "dict[signal.Signals, signal._HANDLER]") -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _preempted(what_is_safe: str) -> Preempted:
    return Preempted(f"stopped by a signal: {what_is_safe}; the same command goes on from here")

"""SIGTERM, SIGINT and SIGUSR1: stage 1 stops at once, stage 2 finishes its step first; both end with exit code 75."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType, ModuleType

from shared.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
AGAIN_SECONDS = 3.0
"""An exception in a destructor or a callback is lost, so a stop is raised again until the work has been left."""
IMPORT_SECONDS = 0.1
"""An exception in the import of a compiled module can abort the process, so a stop waits until the import ends."""


@contextmanager
def raise_on_signal(what_is_safe: str) -> Iterator[None]:
    """Raise `Preempted` in the main thread as soon as a signal arrives; a second signal ends the process.

    For work that loses nothing when it is killed. Enter it before heavy imports.
    """
    received = left = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal received
        if received and number != signal.SIGALRM:
            os._exit(Preempted.exit_code)
        received = True
        if left:
            return
        importing = _is_importing(frame)
        signal.setitimer(signal.ITIMER_REAL, IMPORT_SECONDS if importing else AGAIN_SECONDS)
        if not importing:
            raise KeyboardInterrupt  # libraries catch Exception, and seldom this

    previous = {number: signal.signal(number, stop) for number in (*SIGNALS, signal.SIGALRM)}
    try:
        yield
    except BaseException:
        left = True
        if received:
            raise _preempted(what_is_safe) from None
        raise
    finally:
        left = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        _restore(previous)


def _is_importing(frame: FrameType | None) -> bool:
    """Return True inside an import statement."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


class StopSignal:
    """A flag for work that finishes its step and saves: a first signal sets `requested`, a second ends the process.

    A thread acknowledges them: Python runs a handler between two bytecodes of the main thread, and a step can be one
    call of many seconds.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._request) for number in SIGNALS}
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        from shared import console  # 0.1 s, after the handlers are there

        self._thread = Thread(target=self._acknowledge, args=(reading, console), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self._writing)  # ends the thread
        self._thread.join()
        _restore(self._previous)

    def _request(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True

    def _acknowledge(self, reading: int, console: ModuleType) -> None:
        acknowledged = False
        while received := os.read(reading, 1):
            if received[0] not in SIGNALS:
                continue
            if acknowledged:
                console.say("precog: stopped now; the same command continues from the last checkpoint")
                console.console.show_cursor()
                os._exit(Preempted.exit_code)
            acknowledged = self.requested = True
            console.say("precog: stopping after this step, saving; once more to stop now")
        os.close(reading)

    def check(self, what_is_safe: str) -> None:
        """Raise `Preempted` if a signal has arrived."""
        if self.requested:
            raise _preempted(what_is_safe)


def _restore(handlers: "dict[signal.Signals, signal._HANDLER]") -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _preempted(what_is_safe: str) -> Preempted:
    return Preempted(f"stopped by a signal: {what_is_safe}; the same command goes on from here")

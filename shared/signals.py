"""SIGTERM and SIGINT as a flag that the work polls: it ends at the next whole unit, saved, with exit code 75."""

import os
import signal
import threading
from types import FrameType

from shared.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """While entered, the first signal sets `requested`; a second one acts as it did before.

    Work that loses nothing when it is killed may limit how long it is waited for: `patience_seconds` after the first
    signal the process ends with 75 wherever it is, also inside a call that Python cannot interrupt.
    """

    def __init__(self, *, patience_seconds: float | None = None) -> None:
        self.requested = False
        self._patience_seconds = patience_seconds
        self._previous: dict[int, signal._HANDLER] = {}
        self._left = threading.Event()
        self._wakeup = self._previous_wakeup = -1

    def __enter__(self) -> "StopSignal":
        if self._patience_seconds is not None:
            self._watch(self._patience_seconds)
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._left.set()
        if self._wakeup >= 0:
            signal.set_wakeup_fd(self._previous_wakeup)
            os.close(self._wakeup)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, self._previous[number])

    def _watch(self, patience_seconds: float) -> None:
        """A handler runs between two steps of Python only; what C writes to a pipe wakes a thread at once."""
        source, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)

        def leave() -> None:
            while (heard := os.read(source, 1)) and heard[0] not in SIGNALS:
                continue
            os.close(source)
            if heard and not self._left.wait(patience_seconds):
                os.write(2, b"precog: stopped by a signal; the same command goes on from here\n")
                os._exit(Preempted.exit_code)

        threading.Thread(target=leave, name="stop", daemon=True).start()

    def check(self, what: str) -> None:
        """Raises `Preempted` if a signal has come; `what` says what is safe."""
        if self.requested:
            raise Preempted(f"stopped by a signal: {what}; the same command goes on from here")

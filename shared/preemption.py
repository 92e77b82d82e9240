"""SIGTERM and SIGINT as a flag that the work polls: it ends at the next whole unit, saved, with exit code 75."""

import signal
from types import FrameType

from shared.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """While entered, the first signal sets `requested`; a second one acts as it did before."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> "StopSignal":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, self._previous[number])

    def check(self, what: str) -> None:
        """Raises `Preempted` if a signal has come; `what` says what is safe."""
        if self.requested:
            raise Preempted(f"stopped by a signal: {what}; the same command goes on from here")

"""Processes of this test: decoders found by their command line, and waiting for a condition."""

import time
from collections.abc import Callable

import psutil


def decoders(parent: int | None = None) -> list[psutil.Process]:
    """Return the decoding processes below a process (this one), by number."""
    found = []
    for child in psutil.Process(parent).children(recursive=True):
        try:
            if "precompute.video.child" in child.cmdline():
                found.append(child)
        except psutil.Error:  # it has just ended
            continue
    return sorted(found, key=lambda child: child.pid)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until the condition is true; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never became true"
        time.sleep(0.01)

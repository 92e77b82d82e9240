"""Processes of the tests: decoders found by their command line, commands in forks, and waiting for a condition."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil


def decoders(parent: int | None = None) -> list[psutil.Process]:
    """Return the decoding processes below a process (this one), by number."""
    found = []
    for child in psutil.Process(parent).children(recursive=True):
        try:
            if "shared.media.child" in child.cmdline():
                found.append(child)
        except psutil.Error:  # it has just ended
            continue
    return sorted(found, key=lambda child: child.pid)


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until the condition is true; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never became true"
        time.sleep(0.01)


def fork_command(arguments: list[str], errors: Path) -> int:
    """Run `precog ARGUMENTS` in a fork, which has the libraries loaded already; return its process id."""
    from precog import app

    child = os.fork()
    if child == 0:
        sys.stderr = errors.open("w", 1, "utf-8")
        os.dup2(sys.stderr.fileno(), 2)
        code = 99
        try:
            app(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)
    return child

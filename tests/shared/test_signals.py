"""Signals: a flag first, the old meaning after it, and an end in time where nobody looks at the flag."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.errors import Preempted
from shared.signals import SIGNALS, StopSignal


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_heard_at_the_next_check_and_the_old_handler_comes_back(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        stop.check("all is stored")
        os.kill(os.getpid(), number)
        with pytest.raises(Preempted, match="all is stored") as caught:
            stop.check("all is stored")
    assert caught.value.exit_code == 75 and signal.getsignal(number) == before


def test_a_second_signal_acts_as_it_did_before():
    with StopSignal() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


BUSY = """
import hashlib, time
from shared.signals import StopSignal
with StopSignal(patience_seconds=1) as stop:
    print("ready", flush=True)
    {work}
print("left", flush=True)
"""


def stopped(work: str) -> tuple[int, str, str, float]:
    """Exit code, output, errors and seconds of a process that does `work` and gets SIGTERM."""
    command = [sys.executable, "-c", BUSY.format(work=work)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        sent = time.monotonic()
        child.send_signal(signal.SIGTERM)
        try:
            out, errors = child.communicate(timeout=30)
        finally:
            child.kill()
        return child.returncode, out, errors, time.monotonic() - sent


def test_a_process_deep_in_a_library_ends_in_time():
    """Python runs no handler while the hash is computed."""
    code, out, errors, took = stopped("hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)")
    assert (code, out) == (75, "") and "the same command goes on" in errors
    assert 0.9 < took < 10


def test_a_process_that_ends_by_itself_in_time_is_left_alone():
    code, out, errors, _ = stopped("time.sleep(0.2)")
    assert (code, out, errors) == (0, "left\n", "")


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_watching_for_signals_leaves_nothing_open():
    before = open_files()
    for _ in range(20):
        with StopSignal(patience_seconds=5):
            pass
    deadline = time.monotonic() + 10
    while open_files() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert open_files() == before and signal.set_wakeup_fd(-1) == -1

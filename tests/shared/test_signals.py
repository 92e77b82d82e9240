"""Signals: raised at once in stage 1, a flag in stage 2; a second one stops now, and old handlers come back."""

import importlib
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from shared import signals
from shared.errors import Preempted
from shared.signals import SIGNALS, StopSignal, raise_on_signal

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_raises_at_once_and_the_old_handler_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with (
        pytest.raises(Preempted, match=r"^stopped by a signal: all is stored; ") as caught,
        raise_on_signal("all is stored"),
    ):
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert caught.value.exit_code == 75 and signal.getsignal(number) == before


def test_other_exceptions_pass_and_those_of_a_signal_do_not() -> None:
    with pytest.raises(ZeroDivisionError), raise_on_signal("all is stored"):
        raise ZeroDivisionError
    with pytest.raises(Preempted), raise_on_signal("all is stored"):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt as error:  # libraries convert what their imports raise
            raise RuntimeError("import failed") from error


def test_a_stop_that_was_lost_is_raised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "AGAIN_SECONDS", 0.2)
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(Preempted), raise_on_signal("all is stored"):
        for attempt in range(3):
            try:
                if attempt == 0:
                    os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
            except KeyboardInterrupt:  # as in a destructor
                if attempt == 2:
                    raise
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0) and signal.getsignal(signal.SIGALRM) == before


def test_a_signal_that_comes_after_the_work_stops_nothing() -> None:
    with raise_on_signal("all is stored"):
        handler = signal.getsignal(signal.SIGTERM)
    assert callable(handler)
    try:
        handler(signal.SIGTERM, None)  # as if it had come while the old handlers came back
    except KeyboardInterrupt:  # which would end pytest
        pytest.fail("the work was left before")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_flag_is_set_and_the_old_handler_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        stop.check("all is stored")
        os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(Preempted, match="all is stored") as caught:
            stop.check("all is stored")
    assert caught.value.exit_code == 75 and signal.getsignal(number) == before
    assert signal.set_wakeup_fd(-1) == -1


BUSY = """
import hashlib, os, sys
from shared.signals import StopSignal
with StopSignal() as stop:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)  # half a minute without a bytecode
"""


def test_signals_in_a_long_call_are_acknowledged_during_it() -> None:
    """The first is answered while the main thread is busy; the second ends the process at once."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BUSY]
    with ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
        stack.callback(process.kill)
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        line = b"precog: stopping after this step, saving; once more to stop now\n"
        assert process.stderr.readline() == line and time.monotonic() - sent < 10
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 75
        assert process.stderr.read() == b"precog: stopped now; the same command continues from the last checkpoint\n"


STUBBORN = """
import os, signal, time
from shared.signals import raise_on_signal
with raise_on_signal("all is stored"):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
"""


def test_a_second_signal_ends_a_process_that_is_still_cleaning_up() -> None:
    done = subprocess.run([sys.executable, "-c", STUBBORN], cwd=ROOT, capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (75, b"", b"")


def test_a_stop_waits_until_an_import_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_module.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nWHOLE = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    whole = False
    with pytest.raises(Preempted, match="nothing is lost"), raise_on_signal("nothing is lost"):
        whole = importlib.import_module("slow_module").WHOLE
        time.sleep(60)
    assert whole

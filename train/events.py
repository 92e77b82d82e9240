"""Events of a run beside its steps: events.jsonl, run.log, and the page in a process of its own."""

import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from shared.console import log_file, say
from shared.errors import Preempted
from shared.run_folder import LOG, PAGE, add_event
from train.run import Run

LIBRARIES = ("precog-cogvideox", "torch", "diffusers", "peft", "accelerate")
PAGE_SECONDS = 120.0
"""Deadline of the page at the end of a run."""
PAGE_SHARE, PAGE_CPU_SECONDS = 0.01, 8.0
"""Of a run's time, what pages while it trains may take in CPU time, and the cost of a page until one was measured."""


@contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Keep run.log within the context, and add the error that ends it to the events."""
    with log_file(folder / LOG):
        try:
            yield
        except BaseException as error:
            with suppress(OSError):
                add_event(folder, "stopped" if isinstance(error, Preempted) else "failed", reason=str(error))
            raise


def record_start(run: Run, step: int) -> None:
    """Add the start or resume at optimizer step `step` to the events, with what it runs on."""
    device = run.accelerator.device
    add_event(
        run.config.train.output_dir,
        "resumed" if step else "started",
        step=step,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores",
        processes=run.accelerator.num_processes,
        versions={"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        model=run.conventions.name,
        precision=str(run.transformer.dtype).removeprefix("torch."),
        view=run.view.name,
        view_hash=run.view.hash,
        clips=len(run.dataset.rows),
        held_out_clips=len(run.held_out.rows),
        trial=None if run.trial is None else asdict(run.trial),
    )


class PageProcess:
    """Writes a page in a process of its own: nothing that happens to the page reaches the training."""

    def __init__(self, run: Path, page: str = PAGE) -> None:
        self._run, self._page = run, run / page
        self._child: subprocess.Popen[bytes] | None = None
        self._began, self._spent_seconds, self._last_seconds = time.monotonic(), 0.0, PAGE_CPU_SECONDS

    def start(self, *, nice: int) -> None:
        """Begin a page."""
        command = [sys.executable, "-m", "precog", "report", "run", str(self._run)]
        with suppress(OSError):
            nowhere = subprocess.DEVNULL
            self._child = subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere)
            os.setpriority(os.PRIO_PROCESS, self._child.pid, nice)

    def start_if_cheap(self) -> None:
        """Begin a page in the time that training leaves, unless pages would take 1 % of the run's time so far."""
        allowed = PAGE_SHARE * (time.monotonic() - self._began)
        if self._has_ended() and self._spent_seconds + self._last_seconds <= allowed:
            self.start(nice=19)

    def _has_ended(self) -> bool:
        if self._child is not None and self._child.returncode is None:
            before = _children_seconds()
            if self._child.poll() is None:
                return False
            self._last_seconds = _children_seconds() - before
            self._spent_seconds += self._last_seconds
        return True

    def finish(self, seconds: float = 0.0) -> bool:
        """Wait for the page until a deadline, then end its process; True if the page was written."""
        if self._child is None:
            return False
        try:
            return self._child.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
            return False

    def write_last(self) -> None:
        """Write the page at the end, and say so if that fails."""
        self.start(nice=os.nice(0))
        if not self.finish(PAGE_SECONDS):
            say(f"{self._page}: not written; `precog report run {self._run}` says why")


def _children_seconds() -> float:
    """Return the CPU time of the child processes that have been waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

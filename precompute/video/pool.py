"""The decoding processes together: untrusted videos in, outcomes in order, whatever becomes of a process."""

import math
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import cast

from precompute.video.child import Child, Decoded, DecodeJob, Job, Outcome, ProbeJob, Task
from precompute.video.probe import BadVideo, MachineFault, Probed

MAX_FAILED_STARTS = 5
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
"""Signals that a decoder brings upon itself; any other comes from outside, such as the kernel's for want of memory."""


class DecodePool:
    """Up to `workers` children; a context manager, and used for one stream of jobs at a time.

    Results come in the order of the jobs. A job past its deadline, or whose child crashes, gives one `BadVideo`, and a
    new child takes over. What fails by no fault of the video's is tried once more before it is given as a
    `MachineFault`. The pool moves only while its iterator is advanced: run it in a thread to overlap other work.
    """

    def __init__(self, *, workers: int, deadline_seconds: float, memory_gib: float) -> None:
        assert workers > 0 and deadline_seconds > 0 and memory_gib > 0
        self._workers = workers
        self._deadline_seconds = deadline_seconds
        self._memory_gib = memory_gib
        self._children: list[Child] = []
        self._waiting: deque[Task] = deque()
        self._outcomes: dict[int, Outcome] = {}
        self._busy_seconds = 0.0
        self._failed_starts = 0

    def __enter__(self) -> "DecodePool":
        self._restock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._children:
            self._children.pop().kill()

    def probe_all(self, paths: Iterable[Path]) -> Iterator[Probed | BadVideo | MachineFault]:
        """One outcome per path, in order."""
        return cast("Iterator[Probed | BadVideo | MachineFault]", self._run(ProbeJob(path) for path in paths))

    def decode_all(self, jobs: Iterable[DecodeJob]) -> Iterator[Decoded | BadVideo | MachineFault]:
        """One outcome per job, in order; at most 2 * workers jobs are taken ahead of the consumer."""
        return cast("Iterator[Decoded | BadVideo | MachineFault]", self._run(jobs))

    def busy_seconds(self) -> float:
        """Seconds that children spent on jobs, summed."""
        return self._busy_seconds

    def _run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        assert not self._outcomes and not any(child.task for child in self._children)
        remaining = iter(jobs)
        taken = given = 0
        exhausted = False
        try:
            while True:
                self._collect(blocking=False)
                while not exhausted and taken < given + 2 * self._workers:
                    job = next(remaining, None)
                    exhausted = job is None
                    if job is not None:
                        self._waiting.append(Task(taken, job))
                        taken += 1
                self._dispatch()
                if given in self._outcomes:
                    yield self._outcomes.pop(given)
                    given += 1
                elif exhausted and given == taken:
                    return
                else:
                    self._collect(blocking=True)
        finally:
            self._waiting.clear()
            self._outcomes.clear()
            for child in [child for child in self._children if child.task]:
                self._drop(child)

    def _restock(self) -> None:
        while len(self._children) < self._workers:
            self._children.append(Child(self._memory_gib, self._deadline_seconds))

    def _drop(self, child: Child) -> int | None:
        self._children.remove(child)
        return child.kill()

    def _dispatch(self) -> None:
        """Gives waiting jobs to idle children."""
        self._restock()
        for child in [child for child in self._children if child.ready and child.task is None]:
            if not self._waiting:
                return
            try:
                child.pipe.send(self._waiting[0].job)
            except OSError:  # it died while idle; no job is lost
                self._drop(child)
                continue
            child.task = self._waiting.popleft()
            child.deadline = time.monotonic() + self._deadline_seconds

    def _collect(self, *, blocking: bool) -> None:
        """Takes what children have sent, then kills those past their deadline; blocking, sleeps until either comes."""
        timeout: float | None = 0.0
        if blocking:
            soonest = min((child.deadline for child in self._children), default=0.0)
            timeout = None if soonest == math.inf else max(0.0, soonest - time.monotonic())
        readable = connection.wait([child.pipe for child in self._children], timeout)
        for child in [child for child in self._children if child.pipe in readable]:
            try:
                self._receive(child)
            except (EOFError, OSError):
                self._bury(child)
        now = time.monotonic()
        for child in [child for child in self._children if child.deadline <= now and not child.pipe.poll()]:
            self._bury(child, f"timed out after {self._deadline_seconds:g} s")

    def _receive(self, child: Child) -> None:
        outcome, seconds, leaving = child.receive()
        if child.task is not None and outcome is not None:
            self._busy_seconds += seconds
            self._settle(child.task, outcome)
        child.ready, child.task, child.deadline = True, None, math.inf
        self._failed_starts = 0
        if leaving:
            self._drop(child)

    def _settle(self, task: Task, outcome: Outcome) -> None:
        """Keeps the outcome for its turn, or puts the job in front once more."""
        if isinstance(outcome, MachineFault) and not task.again:
            self._waiting.appendleft(replace(task, again=True))
        else:
            self._outcomes[task.number] = outcome

    def _bury(self, child: Child, reason: str | None = None) -> None:
        """Removes a child that is late (`reason` says so) or dead, and says of the job it worked on what it died of."""
        task, ready = child.task, child.ready
        if task:
            self._busy_seconds += self._deadline_seconds - max(0.0, child.deadline - time.monotonic())
        exitcode = self._drop(child)
        killer = signal.Signals(-exitcode) if exitcode is not None and exitcode < 0 else None
        cause = killer.name if killer else f"exit code {exitcode}"
        if killer == signal.SIGALRM:
            reason = f"timed out after {self._deadline_seconds:g} s"
        self._failed_starts += not ready
        if self._failed_starts > MAX_FAILED_STARTS:
            raise RuntimeError(f"decode processes end before their first job ({reason or cause})")
        if not task:
            return
        if reason or killer is None or killer in CRASHES:
            self._settle(task, BadVideo(reason or f"decoder died ({cause})"))
        else:
            self._settle(task, MachineFault(f"its decoder was killed ({cause})"))

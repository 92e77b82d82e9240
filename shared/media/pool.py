"""The pool of decoding processes: untrusted videos in, outcomes in order, whatever happens to a process."""

import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import cast

from shared.config import Precompute
from shared.media.child import EXIT_SECONDS, Child, Decoded, DecodeJob
from shared.media.probe import Probed, Skipped
from shared.signals import SIGNALS

CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
"""Signals that a decoder causes itself; any other comes from outside, such as the kernel's when memory runs out."""

Outcome = Probed | Decoded | Skipped


class DecodePool:
    """Up to `workers` decoding processes, each driven by one thread; a context manager that kills them on exit.

    Outcomes come in the order of the jobs. A job past its deadline, or whose process crashes, is skipped for good. A
    transient failure is retried once. Jobs run ahead while the consumer is busy.
    """

    def __init__(self, *, workers: int, deadline_seconds: float, memory_gib: float) -> None:
        self._workers = workers
        self._deadline_seconds = deadline_seconds
        self._memory_gib = memory_gib
        self._lock = threading.Lock()
        self._closed = False
        self._children: set[Child] = set()
        self._idle: list[Child] = []
        self.busy_seconds = 0.0
        """Time spent on jobs, summed over the processes."""
        # Blocked signals reach the main thread at once, and never a process started by these threads: schedulers and
        # terminals send them to every process.
        self._threads = ThreadPoolExecutor(
            workers, "decode", initializer=signal.pthread_sigmask, initargs=(signal.SIG_BLOCK, SIGNALS)
        )

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            for child in self._children:
                child.kill()
        self._threads.shutdown(cancel_futures=True)
        for child in self._children:
            child.end()

    def probe_all(self, paths: Iterable[Path]) -> Iterator[Probed | Skipped]:
        """Yield one outcome per path, in order."""
        return cast("Iterator[Probed | Skipped]", self._run(paths, 0))

    def decode_all(self, jobs: Iterable[DecodeJob], ahead: int = 0) -> Iterator[Decoded | Skipped]:
        """Yield one outcome per job, in order; take at most max(ahead, 2 * workers) jobs ahead of the consumer."""
        return cast("Iterator[Decoded | Skipped]", self._run(jobs, ahead))

    def _run(self, jobs: Iterable[Path | DecodeJob], ahead: int) -> Iterator[Outcome]:
        pending: deque[Future[Outcome]] = deque()
        for job in jobs:
            pending.append(self._threads.submit(self._work, job))
            if len(pending) >= max(ahead, 2 * self._workers):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _work(self, job: Path | DecodeJob) -> Outcome:
        outcome = self._attempt(job)
        return self._attempt(job) if isinstance(outcome, Skipped) and not outcome.permanent else outcome

    def _attempt(self, job: Path | DecodeJob) -> Outcome:
        child = self._take_child()
        started = time.perf_counter()
        reusable = False
        try:
            outcome = child.run(job)
            reusable = not child.leaves
            return outcome
        except TimeoutError:
            if not child.ready:
                return Skipped("its decoder does not start", permanent=False)
            advice = "raise precompute.decode_deadline_seconds; an mp4 or mkv of it is probed without decoding"
            return Skipped(f"timed out after {self._deadline_seconds:g} s: {advice}")
        except OSError:
            return _cause_of_death(child)
        finally:
            with self._lock:
                self.busy_seconds += time.perf_counter() - started
                if reusable:
                    self._idle.append(child)
                else:
                    self._children.remove(child)
            if not reusable:
                child.end()

    def _take_child(self) -> Child:
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool is closed")
            while self._idle:
                child = self._idle.pop()
                if child.exit_code(0) is None:
                    return child
                self._children.remove(child)
                child.end()
            child = Child(self._memory_gib, self._deadline_seconds)
            self._children.add(child)
            return child


def decode_pool(settings: Precompute) -> DecodePool:
    """Return the pool that a config describes."""
    seconds, gib = settings.decode_deadline_seconds, settings.decode_memory_gib
    return DecodePool(workers=settings.decode_workers, deadline_seconds=seconds, memory_gib=gib)


def _cause_of_death(child: Child) -> Skipped:
    """Return the outcome of a job whose process died; raise `RuntimeError` if it exited before its first job."""
    exit_code = child.exit_code(EXIT_SECONDS)
    if exit_code is not None and exit_code < 0:
        killer = signal.Signals(-exit_code)
        if killer in CRASHES:
            return Skipped(f"decoder died ({killer.name})")
        return Skipped(f"its decoder was killed ({killer.name})", permanent=False)
    if not child.ready:
        raise RuntimeError(f"a decode process does not start (exit code {exit_code})")
    return Skipped(f"decoder died (exit code {exit_code})")

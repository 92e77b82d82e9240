"""Killable child processes that probe and decode untrusted videos: one video, one deadline, one memory limit.

A child is spawned, imports numpy and PyAV but never torch, and serves one job at a time over its own pipe. Frames come
back as an anonymous memory file whose descriptor travels through the pipe: the kernel frees it with its last holder, so
a child killed at any point leaves nothing behind.
"""

import contextlib
import gc
import math
import mmap
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import connection, reduction
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, cast

import numpy as np

from precompute.decode import Requested, decode
from precompute.video import BadVideo, MachineFault, Probe, Probed, probe

START_SECONDS = 120.0
KILL_SECONDS = 10.0
ORPHAN_SECONDS = 2
MAX_FAILED_STARTS = 5
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
"""Signals that a decoder brings upon itself; any other comes from outside, such as the kernel's for want of memory."""
GIB = 2**30


class Job(Protocol):
    """A picklable frozen record; `run` happens in a child and may raise `BadVideo` or `MachineFault`."""

    def run(self) -> "Probed | Decoded": ...


@dataclass(frozen=True)
class Decoded:
    """`frames` uint8 [F, H, W, 3] RGB as displayed, and who decoded them."""

    frames: np.ndarray
    decoder: str


@dataclass(frozen=True)
class ProbeJob:
    """Probe the file at `path`."""

    path: Path

    def run(self) -> Probed:
        return probe(self.path)


@dataclass(frozen=True)
class DecodeJob:
    """The frames `indices` (ascending, may repeat) of a probed file, and the times they were probed at."""

    path: Path
    probe: Probe
    indices: tuple[int, ...]
    timestamps_us: tuple[int, ...]
    decoder: Requested = "auto"

    def run(self) -> Decoded:
        frames, decoder = decode(self.path, self.probe, self.indices, self.timestamps_us, self.decoder)
        return Decoded(frames, decoder)


@dataclass(frozen=True)
class _Frames:
    """Announces a memory file: its descriptor follows in the pipe."""

    shape: tuple[int, ...]
    decoder: str


@dataclass(frozen=True)
class _Fault:
    """Our own fault or the machine's, not the video's."""

    traceback: str


@dataclass(frozen=True)
class _Reply:
    """Without an outcome: ready for the first job. `leaving`: the memory is spent, no further job is taken."""

    outcome: Probed | BadVideo | MachineFault | _Frames | _Fault | None
    seconds: float
    leaving: bool = False


@dataclass(frozen=True)
class _Task:
    """A job, its number in the stream, and whether this is the second time."""

    number: int
    job: Job
    again: bool = False


class _Child:
    """One process and its pipe; `task` is the job it works on, `deadline` when it is to be killed."""

    def __init__(self, memory_gib: float, deadline_seconds: float) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        arguments = (theirs, memory_gib, deadline_seconds)
        self.process = spawn.Process(target=_serve, args=arguments, name="precog-decode", daemon=True)
        # A child inherits the mask: what schedulers and terminals send to every process is for the parent to decide.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        self.ready = False
        self.task: _Task | None = None
        self.deadline = time.monotonic() + START_SECONDS

    def kill(self) -> int | None:
        """Ends the process now and returns its exit code, negative for the signal that had ended it."""
        self.process.kill()
        self.process.join(KILL_SECONDS)
        exitcode = self.process.exitcode
        if exitcode is not None:  # else the kernel holds it in a call to a file system that does not answer
            self.process.close()
        self.pipe.close()
        return exitcode


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
        self._children: list[_Child] = []
        self._waiting: deque[_Task] = deque()
        self._outcomes: dict[int, Probed | Decoded | BadVideo | MachineFault] = {}
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

    def _run(self, jobs: Iterable[Job]) -> Iterator[Probed | Decoded | BadVideo | MachineFault]:
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
                        self._waiting.append(_Task(taken, job))
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
            self._children.append(_Child(self._memory_gib, self._deadline_seconds))

    def _drop(self, child: _Child) -> int | None:
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

    def _receive(self, child: _Child) -> None:
        reply = cast(_Reply, child.pipe.recv())
        outcome = reply.outcome
        if isinstance(outcome, _Fault):
            raise RuntimeError(f"a decode process failed:\n{outcome.traceback}")
        if child.task is not None and outcome is not None:
            self._busy_seconds += reply.seconds
            if isinstance(outcome, _Frames):
                self._settle(child.task, Decoded(_map_frames(child.pipe, outcome.shape), outcome.decoder))
            else:
                self._settle(child.task, outcome)
        child.ready, child.task, child.deadline = True, None, math.inf
        self._failed_starts = 0
        if reply.leaving:
            self._drop(child)

    def _settle(self, task: _Task, outcome: Probed | Decoded | BadVideo | MachineFault) -> None:
        """Keeps the outcome for its turn, or puts the job in front once more."""
        if isinstance(outcome, MachineFault) and not task.again:
            self._waiting.appendleft(replace(task, again=True))
        else:
            self._outcomes[task.number] = outcome

    def _bury(self, child: _Child, reason: str | None = None) -> None:
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


def _map_frames(pipe: Connection, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 `shape` over the memory file whose descriptor comes next in `pipe`; lives as long as the array."""
    descriptor = reduction.recv_handle(pipe)
    try:
        memory = mmap.mmap(descriptor, math.prod(shape))
    finally:
        os.close(descriptor)
    return np.frombuffer(memory, np.uint8).reshape(shape)


def _serve(pipe: Connection, memory_gib: float, deadline_seconds: float) -> None:
    """The child: jobs in, replies out, until the parent closes the pipe or the memory is spent."""
    import av  # noqa: F401  (mapped before the limit is set)

    _limit_memory(memory_gib)
    gc.freeze()
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        pipe.send(_Reply(None, 0.0))
        leaving = False
        while not leaving:
            job = cast(Job, pipe.recv())
            # The parent kills first; the kernel does it should the parent be gone.
            signal.alarm(math.ceil(deadline_seconds) + ORPHAN_SECONDS)
            begin = time.perf_counter()
            memory: BinaryIO | None = None
            try:
                outcome, memory = _work(job)
            except MemoryError:
                outcome, leaving = BadVideo(f"needs more than {memory_gib:g} GiB"), True
            gc.collect()  # PyAV's decoders lie in cycles, each with its frames
            signal.alarm(0)
            pipe.send(_Reply(outcome, time.perf_counter() - begin, leaving))
            if memory is not None:
                reduction.send_handle(pipe, memory.fileno(), os.getppid())
                memory.close()


def _work(job: Job) -> tuple[Probed | BadVideo | MachineFault | _Frames | _Fault, BinaryIO | None]:
    """Runs `job`; frames go to a memory file, beside their announcement."""
    try:
        result = job.run()
        if isinstance(result, Decoded):
            return _Frames(result.frames.shape, result.decoder), _store_frames(result.frames)
        return result, None
    except MemoryError:
        raise
    except (BadVideo, MachineFault) as error:
        return type(error)(error.reason), None
    except Exception as error:
        return _Fault("".join(traceback.format_exception(error))), None


def _store_frames(frames: np.ndarray) -> BinaryIO:
    """The bytes of `frames` in a file without a name, in memory where the system has such."""
    memory: BinaryIO
    if sys.platform == "linux":
        memory = os.fdopen(os.memfd_create("precog-frames"), "wb")
    else:
        memory = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115
    memory.write(np.ascontiguousarray(frames).data)
    memory.flush()
    return memory


def _limit_memory(memory_gib: float) -> None:
    """Lets the process map `memory_gib` more than it does now (address space, the one limit the kernel keeps)."""
    if sys.platform != "linux":
        return
    mapped = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * mmap.PAGESIZE
    limit = mapped + int(memory_gib * GIB)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))

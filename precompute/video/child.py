"""The decoding process: one video at a time, one deadline, one memory limit.

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
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import numpy as np

from precompute.video.decode import Requested, decode
from precompute.video.probe import BadVideo, MachineFault, Probe, Probed, probe

START_SECONDS = 120.0
KILL_SECONDS = 10.0
ORPHAN_SECONDS = 2
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


Outcome = Probed | Decoded | BadVideo | MachineFault


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
class Task:
    """A job, its number in the stream, and whether this is the second time."""

    number: int
    job: Job
    again: bool = False


class Child:
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
        self.task: Task | None = None
        self.deadline = time.monotonic() + START_SECONDS

    def receive(self) -> tuple[Outcome | None, float, bool]:
        """Outcome of the task or None, its seconds, and whether the child leaves.

        Raises `EOFError` or `OSError` if the child is dead, `RuntimeError` for a fault of ours.
        """
        reply = cast(_Reply, self.pipe.recv())
        said = reply.outcome
        if isinstance(said, _Fault):
            raise RuntimeError(f"a decode process failed:\n{said.traceback}")
        arrived = Decoded(_map_frames(self.pipe, said.shape), said.decoder) if isinstance(said, _Frames) else said
        return arrived, reply.seconds, reply.leaving

    def kill(self) -> int | None:
        """Ends the process now and returns its exit code, negative for the signal that had ended it."""
        self.process.kill()
        self.process.join(KILL_SECONDS)
        exitcode = self.process.exitcode
        if exitcode is not None:  # else the kernel holds it in a call to a file system that does not answer
            self.process.close()
        self.pipe.close()
        return exitcode


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
            too_little = f"needs more than {memory_gib:g} GiB"
            try:
                outcome, memory = _work(job)
            except MemoryError:
                outcome, leaving = BadVideo(too_little), True
            # Some decoders say that their data are invalid where memory ends. Whoever was near leaves, so that no
            # later job is blamed for this one.
            if not leaving and _is_nearly_spent(memory_gib):
                leaving = True
                outcome = BadVideo(f"{too_little}: {outcome.reason}") if isinstance(outcome, BadVideo) else outcome
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


def _is_nearly_spent(memory_gib: float) -> bool:
    """Whether the process has once mapped all but an eighth of what it may: the next picture may have been too much."""
    if sys.platform != "linux":
        return False
    status = Path("/proc/self/status").read_text("ascii")
    peak_bytes = int(status.partition("VmPeak:")[2].split()[0]) * 1024
    limit_bytes, _ = resource.getrlimit(resource.RLIMIT_AS)
    return limit_bytes != resource.RLIM_INFINITY and limit_bytes - peak_bytes < memory_gib * GIB / 8

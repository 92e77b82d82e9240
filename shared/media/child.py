"""The decoding process: one video at a time, under a memory limit; `pool` starts it and kills it at its deadline.

The process imports numpy and PyAV but never torch. A request is one JSON line on a socket. The answer is one JSON line,
and for frames and time stamps the descriptor of a memory file with the raw bytes. The kernel frees that file with its
last holder, so a process killed at any point leaves nothing behind. It also kills the process with its parent.
"""

import contextlib
import ctypes
import gc
import json
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from array import array
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from shared.media.decode import Requested, decode_rows, shape_of
from shared.media.picture import Pixels, Scaled
from shared.media.probe import Probe, Probed, Skipped, VideoError, parse_probe, probe

START_SECONDS = 120.0
EXIT_SECONDS = 1.0
KILL_SECONDS = 10.0
PR_SET_PDEATHSIG = 1
ANSWER_BYTES = 2**20
GIB = 2**30


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """The frames `indices` (ascending, may repeat) of a probed file, with their probed times."""

    path: Path
    probe: Probe
    indices: tuple[int, ...]
    timestamps_us: tuple[int, ...]
    decoder: Requested = "auto"
    scaled: Scaled | None = None
    """The displayed size if None."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """`frames` [F, H, W, 3] RGB as displayed, and the decoder that made them.

    uint8, or float32 (about 0 to 255) where they were scaled or their colors converted.
    """

    frames: np.ndarray
    decoder: str


class Child:
    """The parent's handle of one decoding process."""

    def __init__(self, memory_gib: float, deadline_seconds: float) -> None:
        self.ready = self.leaves = False
        self._deadline_seconds = deadline_seconds
        self._socket, other_end = socket.socketpair()
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        # -P: a file in the working directory must not replace a module
        command = [sys.executable, "-P", "-m", "shared.media.child"]
        with other_end:
            self._process = subprocess.Popen(
                [*command, str(other_end.fileno()), str(memory_gib)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"},
                pass_fds=[other_end.fileno()],
            )

    def run(self, job: Path | DecodeJob) -> Probed | Decoded | Skipped:
        """Probe a path or decode a job. Set `leaves` if the process takes no further job.

        Raise `TimeoutError` at the deadline, another `OSError` if the process died, `RuntimeError` for our own fault.
        """
        if not self.ready:
            self._receive(START_SECONDS)
            self.ready = True
        request = {"path": str(job)} if isinstance(job, Path) else {**asdict(job), "path": str(job.path)}
        self._socket.settimeout(self._deadline_seconds)
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        answer, memory = self._receive(self._deadline_seconds)
        self.leaves = answer["leaves"]
        if "fault" in answer:
            raise RuntimeError(f"a decode process failed:\n{answer['fault']}")
        if "skipped" in answer:
            return Skipped(answer["skipped"], answer["permanent"])
        if isinstance(job, Path):
            return Probed(parse_probe(answer["probe"]), array("q", memory[:] if memory else b""))
        _, shape, dtype = shape_of(job.probe, job.scaled)
        frames = np.frombuffer(memory or b"", dtype).reshape(len(job.indices), *shape)
        return Decoded(frames, answer["decoder"])

    def _receive(self, seconds: float) -> tuple[dict[str, Any], mmap.mmap | None]:
        """Return the answer and its mapped memory file."""
        self._socket.settimeout(seconds)
        line, descriptors = b"", list[int]()
        try:
            while not line.endswith(b"\n"):
                part, more, _, _ = socket.recv_fds(self._socket, 2**16, 1)
                line, descriptors = line + part, descriptors + more
                if not part or len(line) > ANSWER_BYTES:
                    raise ConnectionError("no answer")
            return json.loads(line), mmap.mmap(descriptors[0], 0) if descriptors else None
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def kill(self) -> None:
        """Kill the process and wake the thread that waits for its answer."""
        self._process.kill()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def exit_code(self, seconds: float) -> int | None:
        """Wait for the process to end; return its exit code, negative for a signal, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None

    def end(self) -> None:
        """Kill the process and free its resources."""
        self.kill()
        self._socket.close()
        self.exit_code(KILL_SECONDS)  # longer where the kernel holds it in a call to a dead file system


def serve(connection: socket.socket, memory_gib: float) -> None:
    """Answer requests until the parent closes the connection or the memory is used up."""
    import av  # noqa: F401  (mapped before the limit is set)
    from PIL import Image  # noqa: F401

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _limit_memory(memory_gib)
    gc.freeze()
    connection.sendall(b"{}\n")
    too_little = f"needs more than {memory_gib:g} GiB"
    for line in connection.makefile("rb"):
        memory = _memory_file()
        try:
            answer = _answer(json.loads(line), memory)
            leaves = _is_nearly_used_up(memory_gib)
        except MemoryError:
            answer, leaves = {"skipped": too_little, "permanent": True}, True
        # Some decoders call their data invalid where memory ends.
        if leaves and answer.get("permanent") and answer["skipped"] != too_little:
            answer["skipped"] = f"{too_little}: {answer['skipped']}"
        reply = json.dumps({**answer, "leaves": leaves}).encode() + b"\n"
        with memory:
            if os.fstat(memory.fileno()).st_size and "skipped" not in answer:
                socket.send_fds(connection, [reply], [memory.fileno()])
            else:
                connection.sendall(reply)
        gc.collect()  # PyAV's decoders lie in reference cycles, each with its frames
        if leaves:  # a later job must not fail for this one's memory
            return


class FileRows:
    """Pictures as rows of a file."""

    def __init__(self, file: FileIO) -> None:
        self._file = file

    def __setitem__(self, row: int, picture: Pixels) -> None:
        self._file.seek(row * picture.nbytes)
        content = np.ascontiguousarray(picture).data.cast("B")
        while len(content):
            content = content[self._file.write(content) :]


def _answer(request: dict[str, Any], memory: FileIO) -> dict[str, Any]:
    """Run a request; return the answer's fields. Its raw bytes, int64 time stamps or frames, go to `memory`."""
    path = Path(request["path"])
    try:
        if "indices" not in request:
            found = probe(path)
            FileRows(memory)[0] = np.asarray(found.timestamps_us)
            return {"probe": asdict(found.probe)}
        known, given = parse_probe(request["probe"]), request["scaled"]
        wanted = Scaled(tuple(given["size"]), tuple(given["part"])) if given else None
        indices, times, decoder = request["indices"], request["timestamps_us"], request["decoder"]
        scaled, _, _ = shape_of(known, wanted)
        return {"decoder": decode_rows(path, known, indices, times, decoder, scaled, FileRows(memory))}
    except VideoError as error:
        return {"skipped": error.reason, "permanent": error.permanent}
    except MemoryError:
        raise
    except Exception:
        return {"fault": traceback.format_exc()[-10_000:]}


def _memory_file() -> FileIO:
    """Return a file in memory (on disk where there is no such file) that ends with its last holder."""
    if sys.platform == "linux":
        return FileIO(os.memfd_create("precog-frames"), "wb")
    with tempfile.TemporaryFile() as file:
        return FileIO(os.dup(file.fileno()), "wb")


def _limit_memory(memory_gib: float) -> None:
    """Let the process map `memory_gib` more than now: address space is the one limit that the kernel enforces."""
    if sys.platform != "linux":
        return
    mapped = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * mmap.PAGESIZE
    limit = mapped + int(memory_gib * GIB)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _is_nearly_used_up(memory_gib: float) -> bool:
    """Return True if the peak came within an eighth of the limit: the next picture may have been too much."""
    if sys.platform != "linux":
        return False
    status = Path("/proc/self/status").read_text("ascii")
    peak_bytes = int(status.partition("VmPeak:")[2].split()[0]) * 1024
    limit_bytes, _ = resource.getrlimit(resource.RLIMIT_AS)
    return limit_bytes != resource.RLIM_INFINITY and limit_bytes - peak_bytes < memory_gib * GIB / 8


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as parent, contextlib.suppress(OSError):  # the parent may be gone
        serve(parent, float(sys.argv[2]))

"""Copies between device and host beside the computation: pinned host memory, a stream of their own, events.

Host memory may be shared by the processes of one machine. It is a memory file then: it has no name that a crash could
leave behind, and what /dev/shm holds does not limit it.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from mmap import mmap

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from train.distributed import all_gather as gather
from train.distributed import machine

logger = logging.getLogger(__name__)


def host_empty(num_bytes: int, device: torch.device) -> Tensor:
    """[num_bytes] uint8 on the host, pinned where `device` is a GPU.

    For a model on the meta device it is on meta too, and hidden from the memory simulation.
    """
    if device.type == "meta":
        with _disable_current_modes():
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    if device.type != "cuda":
        return torch.empty(num_bytes, dtype=torch.uint8)
    anonymous = -1
    return _mapped(anonymous, num_bytes, device)


class _Mapping(mmap):
    """Of exactly the bytes asked for, while torch's own pinned memory comes in powers of two (pytorch issue 95823)."""

    pinned_for: torch.device | None = None
    address: int = 0

    def __del__(self) -> None:
        # before it is unmapped; what is left when the process ends, ends with it
        if self.pinned_for is not None and not sys.is_finalizing():
            torch.cuda.synchronize(self.pinned_for)  # no copy is under way
            unpin(self.address)


def _mapped(descriptor: int, num_bytes: int, device: torch.device) -> Tensor:
    """[num_bytes] uint8 of a memory file, or anonymous, pinned where `device` is a GPU, for as long as it is used."""
    mapping = _Mapping(descriptor, num_bytes)
    buffer = torch.frombuffer(mapping, dtype=torch.uint8)
    if device.type == "cuda":
        pin(buffer.data_ptr(), num_bytes)
        mapping.pinned_for, mapping.address = device, buffer.data_ptr()
    return buffer


def pin(address: int, num_bytes: int) -> None:
    """Let copies of every GPU reach it. Raises `RuntimeError`."""
    portable = 1
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, num_bytes, portable))  # type: ignore[no-untyped-call]


def unpin(address: int) -> None:
    """Undo `pin`."""
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))  # type: ignore[no-untyped-call]


def host_copy(tensor: Tensor, device: torch.device) -> Tensor:
    """A contiguous copy on the host, to be used on `device`; the copy is done when this returns."""
    tensor = tensor.detach().contiguous()
    copy = host_empty(tensor.nbytes, device).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def shared_empty(num_bytes: int, device: torch.device, fill: Callable[[Tensor], None]) -> Tensor | None:
    """[num_bytes] uint8 for all processes of this machine, in memory once; the first of them fills it.

    All processes of the run call this together. None to one that is alone on its machine and, after a warning, to one
    that cannot share: it needs memory of its own. On meta there is nothing to share.
    """
    if device.type == "meta":
        return None
    peers = gather((machine(), os.getpid()))
    pids = [pid for name, pid in peers if name == machine()]
    buffer, descriptor = None, -1
    if len(pids) > 1 and pids[0] == os.getpid():
        try:
            descriptor = _memory_file(num_bytes)
            buffer = _mapped(descriptor, num_bytes, device)
            fill(buffer)
        except (OSError, RuntimeError) as error:
            _warn(num_bytes, error)
    offers = dict(zip(peers, gather(None if buffer is None else descriptor), strict=True))  # filled, or given up
    offer = offers[machine(), pids[0]]
    if offer is not None and pids[0] != os.getpid():
        try:
            buffer = _opened(f"/proc/{pids[0]}/fd/{offer}", num_bytes, device)
        except (OSError, RuntimeError) as error:
            _warn(num_bytes, error)
    gather(None)  # everybody has opened it
    if descriptor >= 0:
        os.close(descriptor)
    return buffer


def _memory_file(num_bytes: int) -> int:
    """The descriptor of a new one, with room for all its bytes."""
    descriptor = os.memfd_create("precog-weights")
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _opened(path: str, num_bytes: int, device: torch.device) -> Tensor:
    descriptor = os.open(path, os.O_RDWR)
    try:
        return _mapped(descriptor, num_bytes, device)
    finally:
        os.close(descriptor)


def _warn(num_bytes: int, error: Exception) -> None:
    size = f"{num_bytes / 2**30:.2f} GiB"
    logger.warning(
        "the frozen weights (%s) cannot be shared on this machine, every process keeps its own: %s", size, error
    )


class CopyStream:
    """Copies that run beside the computation on a GPU, and at once elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextmanager
    def after_compute(self) -> Iterator[None]:
        """What is issued inside runs on this stream, after everything the computation has issued so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def record(self) -> torch.cuda.Event | None:
        """The end of what was issued so far; None where copies are done at once."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, event: torch.cuda.Event | None) -> None:
        """The next copy starts after `event`."""
        if self._stream is not None and event is not None:
            self._stream.wait_event(event)

    def compute_waits(self, event: torch.cuda.Event | None) -> None:
        """The computation's next work starts after `event`."""
        if self._stream is not None and event is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(event)

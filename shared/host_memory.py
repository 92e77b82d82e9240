"""Host memory for copies to and from a GPU, and the streams on which they run beside the computation."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

HostAllocator = Callable[[int, torch.device], Tensor]
"""(number of bytes, the device they are for) -> [bytes] uint8."""


def host_empty(num_bytes: int, device: torch.device) -> Tensor:
    """Return [num_bytes] uint8 on the host, pinned where `device` is a GPU.

    Where pinning fails (containers and WSL limit it), the memory is pageable: correct, with slower copies.
    """
    if device.type == "cuda":
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            _warn(str(error).splitlines()[0])
    return torch.empty(num_bytes, dtype=torch.uint8)


@lru_cache
def _warn(reason: str) -> None:
    logger.warning("host memory cannot be pinned, copies to and from the GPU are slower: %s", reason)


class CopyStream:
    """Copies that run beside the computation on a GPU, and at once elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextmanager
    def after_compute(self) -> Iterator[None]:
        """Run what is issued inside on this stream, after everything the computation has issued so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with self.beside_compute():
            yield

    @contextmanager
    def beside_compute(self) -> Iterator[None]:
        """Run what is issued inside on this stream, whatever the computation does."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield

    def record(self) -> torch.cuda.Event | None:
        """Return the end of what was issued so far, or None where copies are done at once."""
        return None if self._stream is None else self._stream.record_event()

    def compute_waits(self, event: torch.cuda.Event | None) -> None:
        """Let what the computation issues from now on start after `event`."""
        if self._stream is not None and event is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(event)

"""Copies between device and host beside the computation: pinned host memory, a stream of their own, events."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


def host_empty(num_bytes: int, device: torch.device) -> Tensor:
    """[num_bytes] uint8 on the host, pinned where `device` is a GPU.

    For a model on the meta device it is on meta too, and hidden from `train.memory`, which counts the device's bytes.
    """
    if device.type == "meta":
        with _disable_current_modes():
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def host_copy(tensor: Tensor, device: torch.device) -> Tensor:
    """A contiguous copy on the host, to be used on `device`; the copy is done when this returns."""
    tensor = tensor.detach().contiguous()
    copy = host_empty(tensor.nbytes, device).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


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

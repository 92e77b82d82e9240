"""What need not stay on the device: frozen block weights come in from the host, saved activations go out and back.

Weights are never copied back, because nothing changes them. Both ways are double-buffered: the copy for the next block
runs on a stream of its own while this block computes. On a CPU the same code makes plain copies.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock, CogVideoXTransformer3DModel
from torch import Tensor, nn

from train.transformer.host_memory import CopyStream, host_empty, shared_empty

ALIGNMENT = 256
"""Bytes; what kernels like best."""


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor's place in a buffer of bytes."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def stop(self) -> int:
        return self.offset + prod(self.shape) * self.dtype.itemsize

    def view(self, buffer: Tensor) -> Tensor:
        return buffer[self.offset : self.stop].view(self.dtype).view(self.shape)


def lay_out(tensors: Sequence[Tensor]) -> tuple[list[Place], int]:
    """Places one after the other, and the bytes of the buffer that holds them."""
    places, end = [], 0
    for tensor in tensors:
        place = Place(-(-end // ALIGNMENT) * ALIGNMENT, tensor.shape, tensor.dtype)
        places.append(place)
        end = place.stop
    return places, -(-end // ALIGNMENT) * ALIGNMENT


def frozen_weights(block: CogVideoXBlock) -> list[nn.Parameter]:
    """Of a block, without the layers of its modulation, which `train.transformer.modulation` looks after."""
    modulation = {id(value) for norm in (block.norm1, block.norm2) for value in norm.linear.parameters()}
    return [value for value in block.parameters() if not value.requires_grad and id(value) not in modulation]


class WeightStream:
    """Every block's frozen weights in host memory, and room for `resident_blocks` of them on the device.

    The processes of one machine share the host memory, so that all of them have to make theirs together.
    """

    def __init__(self, transformer: CogVideoXTransformer3DModel, resident_blocks: int, device: torch.device) -> None:
        assert resident_blocks >= 2, "one block computes while another is copied"
        self._weights = [frozen_weights(block) for block in transformer.transformer_blocks]
        layouts = [lay_out([value.data for value in weights]) for weights in self._weights]
        self._places = [places for places, _ in layouts]
        sizes = [num_bytes for _, num_bytes in layouts]
        self._hosts: list[Tensor] = []
        shared = shared_empty(sum(sizes), device, lambda buffer: self._move_to(torch.split(buffer, sizes)))
        if shared is None:
            self._move_to([host_empty(num_bytes, device) for num_bytes in sizes])
        else:
            self._hosts = list(torch.split(shared, sizes))
            for index, host in enumerate(self._hosts):
                self._point(index, host)
        largest = max(sizes)
        self._free = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(resident_blocks)]
        self._resident: OrderedDict[int, tuple[Tensor, torch.cuda.Event | None]] = OrderedDict()
        """Block -> its buffer and the end of its copy; the least recently used comes first."""
        self._copies = CopyStream(device)

    @property
    def num_resident(self) -> int:
        """Blocks on the device now."""
        return len(self._resident)

    @contextmanager
    def resident(self, index: int, next_index: int) -> Iterator[None]:
        """Inside, the block's weights are on the device; meanwhile those of `next_index` are fetched."""
        self._fetch(index)
        self._resident.move_to_end(index)
        if 0 <= next_index < len(self._weights):
            self._fetch(next_index)
        buffer, copied = self._resident[index]
        self._copies.compute_waits(copied)
        self._point(index, buffer)
        try:
            yield
        finally:
            self._point(index, self._hosts[index])

    def _fetch(self, index: int) -> None:
        if index in self._resident:
            return
        buffer = self._free.pop() if self._free else self._resident.popitem(last=False)[1][0]
        host = self._hosts[index]
        with self._copies.after_compute():  # whoever computed with this buffer is done with it
            buffer[: len(host)].copy_(host, non_blocking=True)
        self._resident[index] = (buffer, self._copies.record())

    def _move_to(self, hosts: Sequence[Tensor]) -> None:
        """Block by block, so that no more than one is there twice."""
        self._hosts = list(hosts)
        for index, host in enumerate(hosts):
            for value, place in zip(self._weights[index], self._places[index], strict=True):
                place.view(host).copy_(value.data)
            self._point(index, host)

    def _point(self, index: int, buffer: Tensor) -> None:
        for value, place in zip(self._weights[index], self._places[index], strict=True):
            value.data = place.view(buffer)


@dataclass(slots=True, eq=False)
class Offloaded:
    """One block's saved tensors in host memory, from its forward pass to its backward pass."""

    host: Tensor
    places: list[Place]
    previous: "Offloaded | None"
    """Saved just before this one, so needed just after it."""
    device_copy: Tensor | None = None
    copied: torch.cuda.Event | None = None
    """End of the last copy, out or back."""
    done: bool = False
    sources: list[Tensor] = field(default_factory=list)
    """Held until they are copied out."""


class ActivationOffload:
    """Host buffers for saved activations; a buffer is free again when its block's backward pass has taken it back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out, self._back = CopyStream(device), CopyStream(device)
        self._free: list[Tensor] = []
        self._last: Offloaded | None = None
        self.num_sent = 0
        """Blocks whose activations went out, ever."""

    def send(self, tensors: Sequence[Tensor]) -> Offloaded:
        """Copy out; the device's memory is free again one `send` later."""
        self._settle()
        places, num_bytes = lay_out(tensors)
        saved = Offloaded(self._host(num_bytes), places, self._last, sources=list(tensors))
        with self._out.after_compute():
            for tensor, place in zip(tensors, places, strict=True):
                place.view(saved.host).copy_(tensor, non_blocking=True)
        saved.copied = self._out.record()
        self._last = saved
        self.num_sent += 1
        return saved

    def take_back(self, saved: Offloaded) -> list[Tensor]:
        """The tensors on the device; those needed next are on their way. Once for each `send`."""
        assert not saved.done, "a second backward pass over a block whose activations are gone"
        self._settle()
        self._fetch(saved)
        if saved.previous is not None and not saved.previous.done:
            self._fetch(saved.previous)
        self._back.compute_waits(saved.copied)
        buffer = saved.device_copy
        assert buffer is not None
        self._free.append(saved.host)
        saved.done, saved.device_copy, saved.previous = True, None, None
        return [place.view(buffer) for place in saved.places]

    def _settle(self) -> None:
        """The computation may reuse the memory of what was sent last only when that is copied."""
        if self._last is not None and self._last.sources:
            self._out.compute_waits(self._last.copied)
            self._last.sources = []

    def _fetch(self, saved: Offloaded) -> None:
        if saved.device_copy is not None:
            return
        saved.device_copy = torch.empty(saved.places[-1].stop, dtype=torch.uint8, device=self._device)
        with self._back.after_compute():  # its memory may have been another's a moment ago
            self._back.wait(saved.copied)
            saved.device_copy.copy_(saved.host[: len(saved.device_copy)], non_blocking=True)
        saved.copied = self._back.record()

    def _host(self, num_bytes: int) -> Tensor:
        """The smallest free buffer that is large enough, or a new one."""
        fitting = [buffer for buffer in self._free if len(buffer) >= num_bytes]
        if not fitting:
            if self._free:  # larger packs than before: what is too small now will not be missed
                self._free.pop(0)
            return host_empty(num_bytes, self._device)
        smallest = min(fitting, key=len)
        self._free = [buffer for buffer in self._free if buffer is not smallest]
        return smallest

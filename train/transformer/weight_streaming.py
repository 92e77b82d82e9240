"""Frozen block weights in host memory, copied to the device just before they are needed, and never back.

The copies are double-buffered: the next block's weights arrive on their own stream while this block computes. On a CPU
the same code makes plain copies.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor, nn

from train.transformer.host_memory import CopyStream, HostAllocator, host_empty

ALIGNMENT = 256
"""Bytes between the starts of two tensors are a multiple of this; GPU kernels expect no less."""


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor's place in a buffer of bytes."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def stop(self) -> int:
        """The byte after the tensor's last."""
        return self.offset + prod(self.shape) * self.dtype.itemsize

    def view(self, buffer: Tensor) -> Tensor:
        """Return the tensor in `buffer`."""
        return buffer[self.offset : self.stop].view(self.dtype).view(self.shape)


def lay_out(tensors: Sequence[Tensor]) -> tuple[list[Place], int]:
    """Return places one after the other, and the bytes of the buffer that holds them."""
    places, end = [], 0
    for tensor in tensors:
        place = Place(-(-end // ALIGNMENT) * ALIGNMENT, tensor.shape, tensor.dtype)
        places.append(place)
        end = place.stop
    return places, -(-end // ALIGNMENT) * ALIGNMENT


def frozen_weights(block: CogVideoXBlock) -> list[nn.Parameter]:
    """Return the parameters of a block that training does not change."""
    return [value for value in block.parameters() if not value.requires_grad]


def modulation_weights(block: CogVideoXBlock) -> list[nn.Parameter]:
    """Return the frozen parameters of a block's modulation: a seventh of a 5B block, read for one row per clip."""
    return [
        value for norm in (block.norm1, block.norm2) for value in norm.linear.parameters() if not value.requires_grad
    ]


class WeightStream:
    """Weights of every block in host memory, and buffers for those of `num_buffers` blocks on the device.

    A block's weights point at its buffer until that buffer becomes another block's, because autograd reads them after
    the block's recomputation; otherwise they point at host memory.
    """

    def __init__(
        self,
        weights: Sequence[Sequence[nn.Parameter]],
        num_buffers: int,
        device: torch.device,
        allocate: HostAllocator = host_empty,
    ) -> None:
        assert num_buffers >= 2, "one block computes while another is copied"
        self._weights = weights
        layouts = [lay_out([value.data for value in of_block]) for of_block in weights]
        self._places = [places for places, _ in layouts]
        self._hosts: list[Tensor] = []
        for index, (places, num_bytes) in enumerate(layouts):  # one block at a time is in memory twice
            self._hosts.append(allocate(num_bytes, device))
            for value, place in zip(weights[index], places, strict=True):
                place.view(self._hosts[index]).copy_(value.data)
            self._point(index, self._hosts[index])
        largest = max(num_bytes for _, num_bytes in layouts)
        self._free = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(num_buffers)]
        self._resident: OrderedDict[int, tuple[Tensor, torch.cuda.Event | None]] = OrderedDict()
        """Block -> its buffer and the end of its copy; the least recently used comes first."""
        self._copies = CopyStream(device)

    @property
    def resident(self) -> list[int]:
        """Blocks whose weights are on the device or on their way."""
        return list(self._resident)

    def bring(self, index: int, next_index: int) -> None:
        """Point a block's weights at the device, and start to copy those of `next_index` if there is such a block."""
        self._fetch(index)
        self._resident.move_to_end(index)
        if 0 <= next_index < len(self._weights):
            self._fetch(next_index)
        buffer, copied = self._resident[index]
        self._copies.compute_waits(copied)
        self._point(index, buffer)

    def evict_all(self) -> None:
        """Point every block's weights at host memory, so that the buffers are freed with this stream."""
        for index, host in enumerate(self._hosts):
            self._point(index, host)

    def _fetch(self, index: int) -> None:
        if index in self._resident:
            return
        if self._free:
            buffer = self._free.pop()
        else:
            evicted, (buffer, _) = self._resident.popitem(last=False)
            self._point(evicted, self._hosts[evicted])
        host = self._hosts[index]
        with self._copies.after_compute():  # the evicted block's computation is done by then
            buffer[: len(host)].copy_(host, non_blocking=True)
        self._resident[index] = (buffer, self._copies.record())

    def _point(self, index: int, buffer: Tensor) -> None:
        for value, place in zip(self._weights[index], self._places[index], strict=True):
            value.data = place.view(buffer)

"""Frozen block weights in host memory, copied to the device just before they are needed, and never back.

The copies are double-buffered: the next block's weights arrive on their own stream while this block computes. On a CPU
the same code makes plain copies.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor, nn

from shared.host_memory import CopyStream, HostAllocator, host_empty

ALIGNMENT = 256
"""Bytes between the starts of two tensors are a multiple of this; GPU kernels expect no less."""


def buffer_bytes(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of a buffer that holds all tensors."""
    return sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors)


def views(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors with the shapes and dtypes of `like`, one after the other in a buffer of bytes."""
    found, start = [], 0
    for tensor in like:
        found.append(buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return found


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
        self._hosts: list[Tensor] = []
        for of_block in weights:  # one block at a time is in memory twice
            host = allocate(buffer_bytes(of_block), device)
            for value, place in zip(of_block, views(host, of_block), strict=True):
                value.data = place.copy_(value.data)
            self._hosts.append(host)
        largest = max(map(len, self._hosts))
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
        for value, place in zip(self._weights[index], views(buffer, self._weights[index]), strict=True):
            value.data = place

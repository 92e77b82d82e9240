"""Kept activations in host memory: out on one stream in the forward pass, back on another in the backward pass.

On a CPU the same code makes plain copies.
"""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.host_memory import CopyStream, HostAllocator, host_empty


@dataclass(slots=True, eq=False)
class OffloadedTensor:
    """One kept tensor between its forward and its backward pass."""

    host: Tensor | None
    """None once the copy back is issued; torch reuses pinned memory only after it."""
    order: list[int]
    """Dimensions from the outermost in memory, so that every copy is contiguous."""
    source: Tensor | None
    """The tensor on the device, until it is copied out."""
    device_copy: Tensor | None = None


class OffloadedBlock:
    """The kept tensors of one block."""

    def __init__(self, offload: "ActivationOffload", previous: "OffloadedBlock | None") -> None:
        self._offload = offload
        self._previous = None if previous is None else weakref.ref(previous)
        """Kept just before, needed just after."""
        self._tensors: list[OffloadedTensor] = []
        self._fetched = False
        self._copied: torch.cuda.Event | None = None
        """End of the last copy, out or back."""

    def send(self, tensor: Tensor) -> OffloadedTensor:
        """Copy a tensor out; its memory is free again two blocks later."""
        out, tensor = self._offload.out, tensor.detach()
        order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
        ordered = tensor.permute(order)
        host = self._offload.allocate(tensor.nbytes, tensor.device).view(tensor.dtype).view(ordered.shape)
        with out.after_compute():
            host.copy_(ordered, non_blocking=True)
        self._copied = out.record()
        saved = OffloadedTensor(host, order, tensor)
        self._tensors.append(saved)
        return saved

    def release(self) -> None:
        """Let the computation reuse the memory of what is copied out, once it is."""
        self._offload.out.compute_waits(self._copied)
        for saved in self._tensors:
            saved.source = None

    def take_back(self, saved: OffloadedTensor) -> Tensor:
        """Return a tensor on the device, once, while those of the block before are fetched."""
        self._offload.release(all_but=0)
        self._fetch()
        previous = None if self._previous is None else self._previous()
        if previous is not None:
            previous._fetch()
        self._offload.back.compute_waits(self._copied)
        assert saved.device_copy is not None, "a second backward pass over a block whose activations are gone"
        ordered, saved.device_copy = saved.device_copy, None
        return ordered.permute([saved.order.index(dim) for dim in range(ordered.ndim)])

    def _fetch(self) -> None:
        if self._fetched:
            return
        self._fetched, back = True, self._offload.back
        device = self._offload.device
        hosts = [saved.host for saved in self._tensors if saved.host is not None]
        copies = [torch.empty(host.shape, dtype=host.dtype, device=device) for host in hosts]
        with back.after_compute():  # which has waited for the copies out, and may just have freed this memory
            for copy, host in zip(copies, hosts, strict=True):
                copy.copy_(host, non_blocking=True)
        self._copied = back.record()
        for saved, copy in zip(self._tensors, copies, strict=True):
            saved.host, saved.device_copy = None, copy


class ActivationOffload:
    """The two streams, and the blocks whose tensors are on their way out."""

    def __init__(self, device: torch.device, allocate: HostAllocator = host_empty) -> None:
        self.device, self.allocate = device, allocate
        self.out, self.back = CopyStream(device), CopyStream(device)
        self.num_blocks = 0
        """Blocks whose activations were ever offloaded."""
        self._leaving: list[OffloadedBlock] = []
        self._last: weakref.ref[OffloadedBlock] | None = None

    def open_block(self) -> OffloadedBlock:
        """Return the place for the next block's tensors; blocks before the last free their memory."""
        self.release(all_but=1)
        block = OffloadedBlock(self, None if self._last is None else self._last())
        self.num_blocks += 1
        self._leaving.append(block)
        self._last = weakref.ref(block)
        return block

    def release(self, all_but: int) -> None:
        """Free the device's memory of all but the last blocks that were sent."""
        while len(self._leaving) > all_but:
            self._leaving.pop(0).release()

"""Counting a device's bytes without the device: a program runs on torch's meta device, its live storage is summed."""

import weakref
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode

ROUNDING = 512
"""Bytes; torch's CUDA allocator hands out multiples of it."""

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]


class Tally(TorchDispatchMode):
    """Inside, every storage that an operation makes is counted until it is freed.

    A storage made elsewhere, such as a host buffer, is not counted, whatever is copied into it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = 0
        self.peak_bytes = 0
        self._counted: set[int] = set()
        self._results: dict[Any, tuple[type, list[Layout]]] = {}
        """What pure operations made of such arguments before; meta kernels are slow and always answer the same."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given: set[int] = set()
        key = (func, _describe(args, given), _describe(tuple(kwargs.items()), given))
        known = self._results.get(key)
        if known is not None:
            kind, layouts = known
            made = [torch.empty_strided(size, stride, dtype=dtype, device=on) for size, stride, dtype, on in layouts]
            for tensor in made:
                self._count(tensor.untyped_storage())
            return made[0] if kind is Tensor else kind(made)
        result = func(*args, **kwargs)
        tensors = list(result) if isinstance(result, tuple | list) else [result]
        storages = [value.untyped_storage() for value in tensors if isinstance(value, Tensor)]
        fresh = [storage for storage in storages if storage._cdata not in given]
        for storage in fresh:
            self._count(storage)
        pure = len(fresh) == len(tensors) == len({storage._cdata for storage in fresh})
        if pure and given and not func._schema.is_mutable:
            layouts = [(value.size(), value.stride(), value.dtype, value.device) for value in tensors]
            self._results[key] = (type(result) if isinstance(result, tuple | list) else Tensor, layouts)
        return result

    def _count(self, storage: UntypedStorage) -> None:
        key = storage._cdata
        if key in self._counted or storage.device.type != "meta":
            return
        num_bytes = -(-storage.nbytes() // ROUNDING) * ROUNDING
        self._counted.add(key)
        self.num_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)
        weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._counted.discard(key)
        self.num_bytes -= num_bytes


def _describe(value: Any, given: set[int]) -> Any:
    """Everything of an argument that decides the layout of a result, hashable; its storages are added to `given`."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        given.add(storage._cdata)
        return value.size(), value.stride(), value.dtype, value.device
    if isinstance(value, tuple | list):
        return tuple(_describe(part, given) for part in value)
    return type(value), value

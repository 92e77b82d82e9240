"""An emulated GPU: streams are queues, kernels run late, and freed memory is reused at once.

A call is queued on the current stream. Queues advance when the host waits, in an order that a schedule chooses among
all that the events allow. Device memory is free when the host drops it, as in torch's caching allocator, and its next
owner finds NaN. Queued kernels hold addresses, so they do not keep device memory alive. Pinned host memory lives until
its copies are done, as in torch's host allocator.
"""

import importlib.util
import inspect
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from shared.host_memory import CopyStream

CUDA = torch.device("cuda", 0)
ARENA_BYTES = 1 << 28
"""Only the pages that are used take memory."""
Choose = Callable[[Sequence[int]], int]
"""Indices of the streams that can go on, in order of creation -> the stream that does. The computation is stream 0."""


def starve(index: int) -> Choose:
    """Return the schedule in which the stream at `index` goes on only when no other stream can."""
    return lambda able: max(able, key=lambda one: (one != index, one))


SCHEDULES: dict[str, Choose] = {
    "compute-first": min,
    "copies-first": max,
    "starve-compute": starve(0),
    "starve-weights": starve(1),
    "starve-out": starve(2),
    "starve-back": starve(3),
}


class EmulatedEvent:
    """A point in a stream's queue; `advance` runs one entry of any queue."""

    done = False

    def __init__(self, advance: Callable[[], bool]) -> None:
        self._advance = advance

    def synchronize(self) -> None:
        """Let the host wait for it."""
        with _disable_current_modes():  # kernels run, and are not queued again
            while not self.done:
                assert self._advance(), "every stream waits for another"


class EmulatedStream:
    """The part of `torch.cuda.Stream` that copy streams use: a queue of kernels to run and events to wait for."""

    device = CUDA

    def __init__(self, advance: Callable[[], bool]) -> None:
        self.queue: deque[Callable[[], object] | EmulatedEvent] = deque()
        self._advance = advance

    def record_event(self) -> EmulatedEvent:
        """Return the end of what was queued so far."""
        event = EmulatedEvent(self._advance)
        self.queue.append(partial(setattr, event, "done", True))
        return event

    def wait_event(self, event: EmulatedEvent) -> None:
        """Let what is queued from now on run after `event`."""
        self.queue.append(event)

    def wait_stream(self, other: "EmulatedStream") -> None:
        """Let what is queued from now on run after what `other` has queued so far."""
        self.wait_event(other.record_event())

    def can_go_on(self) -> bool:
        """Return whether the first entry of the queue waits for nothing."""
        return bool(self.queue) and (not isinstance(self.queue[0], EmulatedEvent) or self.queue[0].done)


class Arena:
    """A range of memory; a buffer is free when its last tensor is gone."""

    def __init__(self) -> None:
        self.memory = np.empty(ARENA_BYTES + 256, np.uint8)
        self.start = self.memory.ctypes.data + -self.memory.ctypes.data % 256
        self.offset = self.start - self.memory.ctypes.data
        self.top, self.num_reused = 0, 0
        self.free: dict[tuple[int, int], list[int]] = {}

    def lease(self, num_bytes: int, pool: int) -> Any:
        """Return an array of at least `num_bytes`; memory freed in the same pool comes first."""
        size = max(256, 1 << (num_bytes - 1).bit_length())
        free = self.free.setdefault((pool, size), [])
        if free:
            self.num_reused += 1
            start = free.pop()
        else:
            start, self.top = self.top, self.top + size
            assert self.top <= ARENA_BYTES, "the emulated memory is full"
        array = np.frombuffer(self.memory, np.uint8, size, self.offset + start)
        weakref.finalize(array, free.append, start).atexit = False
        return array

    def holds(self, tensor: Tensor) -> bool:
        """Return whether the tensor's memory is in this range."""
        return self.start <= tensor.data_ptr() < self.start + ARENA_BYTES

    def alias(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the same memory that does not keep the memory alive."""
        start, size = tensor.data_ptr() - self.start + self.offset, tensor.dtype.itemsize
        everything = torch.frombuffer(self.memory, dtype=tensor.dtype, offset=start % size, count=ARENA_BYTES // size)
        return everything.as_strided(tensor.size(), tensor.stride(), start // size)


class EmulatedGpu(TorchDispatchMode):
    """A device with every tensor that is made inside `emulate`; tensors from outside are on the device, too."""

    def __init__(self, choose: Choose, progress: random.Random | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.choose, self.progress = choose, progress
        """`progress` lets queues advance at random moments while the host issues calls."""
        self.current = EmulatedStream(self._advance)
        self.streams = [self.current]
        self.device_memory, self.host_memory = Arena(), Arena()
        self._metas: dict[Any, Any] = {}

    @contextmanager
    def emulate(self) -> Iterator[None]:
        """Make torch's streams emulated ones, and queue every operation inside."""
        opened = CopyStream.__init__
        with ExitStack() as patches:
            for owner, name, value in (
                (torch.cuda, "Stream", self._new_stream),
                (torch.cuda, "current_stream", lambda device: self.current),
                (torch.cuda, "stream", self._on),
                (CopyStream, "__init__", lambda stream, device: opened(stream, CUDA)),
            ):
                patches.enter_context(patch.object(owner, name, value))
            with self:
                yield
            self.synchronize()

    def allocate(self, num_bytes: int, device: torch.device) -> Tensor:
        """Return [num_bytes] uint8 of pinned host memory."""
        return torch.frombuffer(self.host_memory.lease(num_bytes, 0), dtype=torch.uint8, count=num_bytes)

    def synchronize(self) -> None:
        """Run everything that is queued."""
        for stream in self.streams:
            self._finish(stream)

    def _new_stream(self, device: torch.device) -> EmulatedStream:
        self.streams.append(EmulatedStream(self._advance))
        return self.streams[-1]

    @contextmanager
    def _on(self, stream: EmulatedStream) -> Iterator[None]:
        with patch.object(self, "current", stream):
            yield

    def _issue(self, kernel: Callable[[], object]) -> None:
        self.current.queue.append(kernel)
        while self.progress is not None and self.progress.random() < 0.3 and self._advance():
            pass

    def _advance(self) -> bool:
        able = [index for index, stream in enumerate(self.streams) if stream.can_go_on()]
        if able:
            entry = self.streams[self.choose(able)].queue.popleft()
            if not isinstance(entry, EmulatedEvent):
                entry()
        return bool(able)

    def _finish(self, stream: EmulatedStream) -> None:
        while stream.queue:
            assert self._advance(), "every stream waits for another"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Queue an operation, and return results whose memory it will fill; views are made at once."""
        kwargs, schema = kwargs or {}, func._schema
        aliases = [result.alias_info for result in schema.returns]
        if func is torch.ops.aten._unsafe_view.default or (aliases and all(a and not a.is_write for a in aliases)):
            return func(*args, **kwargs)
        kernel = partial(func, *_each(args, self._alias), **_each(kwargs, self._alias))
        inputs = list(_tensors((args, kwargs)))
        across = any(map(self.host_memory.holds, inputs))
        assert not across or func is torch.ops.aten.copy_.default, f"{func} computes with host memory"
        if schema.is_mutable:
            assert schema.name.endswith("_"), f"{func} is not emulated"
            self._issue(kernel)
            if across and True not in args[2:]:  # a copy that is not `non_blocking`
                self._finish(self.current)
            return args[0]
        if aliases and schema.returns[0].type.kind() not in ("TensorType", "ListType"):  # a number for the host
            self._finish(self.current)
            return kernel()
        if inputs:
            made = _each(self._meta(func, args, kwargs), self._empty)
        else:  # a factory: what the host draws or sets is put on the device
            result = kernel()
            made, kernel = _each(result, self._empty), partial(_each, result, Tensor.clone)
        targets = [self._alias(tensor) for tensor in _tensors(made)]

        def run() -> None:
            for target, value in zip(targets, _tensors(kernel()), strict=True):
                target.copy_(value)

        if "empty" not in func.__name__:
            self._issue(run)
        return made

    def _alias(self, tensor: Tensor) -> Tensor:
        """Return a queued kernel's view of a tensor: the bare address where it is the device's."""
        return self.device_memory.alias(tensor) if self.device_memory.holds(tensor) else tensor.detach()

    def _empty(self, like: Tensor) -> Tensor:
        extent = 1 + sum((length - 1) * step for length, step in zip(like.size(), like.stride(), strict=True))
        array = self.device_memory.lease(max(1, extent) * like.dtype.itemsize, self.streams.index(self.current))
        made = torch.frombuffer(array, dtype=like.dtype).as_strided(like.size(), like.stride())
        start = array.ctypes.data - self.device_memory.memory.ctypes.data
        self._issue(partial(self.device_memory.memory[start : start + len(array)].fill, 0xFF))  # NaN in every dtype
        return made

    def _meta(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the results as meta tensors, which have shapes and strides alone."""
        described = [(tensor.size(), tensor.stride(), tensor.dtype) for tensor in _tensors((args, kwargs))]
        key = (func, str(described), str(_each((args, kwargs), lambda tensor: None)))
        if key not in self._metas:
            self._metas[key] = func(*_each(args, _on_meta), **_each(kwargs, _on_meta))
        return self._metas[key]


class Mutant(NamedTuple):
    """One change to the source text of a module."""

    module: ModuleType
    name: str
    edits: Sequence[tuple[str, str]]

    @property
    def text(self) -> str:
        """The module's source with the change."""
        text = inspect.getsource(self.module)
        for old, new in self.edits:
            assert text.count(old) == 1, f"{self.name}: expected once, got {text.count(old)} times: {old!r}"
            text = text.replace(old, new)
        return text

    @contextmanager
    def installed(self, folder: Path) -> Iterator[None]:
        """Give the module's classes the functions of the changed module."""
        path = folder / "mutant.py"
        path.write_text(self.text)
        spec = importlib.util.spec_from_file_location("mutant", path)
        assert spec is not None and spec.loader is not None
        changed = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(changed)
        with ExitStack() as patches:
            for name, original in inspect.getmembers(self.module, inspect.isclass):
                if original.__module__ == self.module.__name__:
                    for attribute, value in inspect.getmembers(getattr(changed, name), inspect.isfunction):
                        patches.enter_context(patch.object(original, attribute, value))
                    setattr(changed, name, original)
            yield


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _each(value: Any, change: Callable[[Tensor], object]) -> Any:
    """Return nested arguments or results with every tensor changed; a device becomes meta for meta tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _each(item, change) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_each(item, change) for item in value)
    return torch.device("meta") if isinstance(value, torch.device) and change is _on_meta else value


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested arguments or results, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)

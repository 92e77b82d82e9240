"""Memory of a plan without its device: the real code runs on torch's meta device, and its live storage is summed.

A prediction counts the tensors that torch allocates: frozen weights, fp32 adapter, its gradients and Adam moments,
activations. It leaves out the CUDA context and what the allocator reserves beyond.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shared.config import Train
from shared.model.conventions import Conventions
from shared.model.geometry import Bucket, latent_shape, padding_frames
from train.data.example import ModelInput
from train.objective import clip_loss
from train.transformer.engine import Plan, open_engine
from train.transformer.forward import predict
from train.transformer.load import add_adapter
from train.transformer.positions import forget_tables

META = torch.device("meta")
ROUNDING = 512
"""Bytes; torch's CUDA allocator hands out multiples of it."""

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Prediction:
    """Bytes on the device, of one process that trains on one pack."""

    peak: int
    """The most that is allocated at once."""
    loaded: int
    """Before the first step: weights, adapter, gradients, Adam moments."""
    kept: int
    """Beyond that between forward and backward pass: kept activations, mostly."""


def predict_peak(
    transformer_config: Mapping[str, Any],
    conventions: Conventions,
    train: Train,
    plan: Plan,
    pack: Sequence[Bucket],
    dtype: torch.dtype,
) -> Prediction:
    """Return the memory of training on `pack` with a transformer in `dtype`, Adam in fp32 and a CUDA attention kernel.

    Shallow models are run and extrapolated to the real
    depth, which is exact because blocks of one level cost the same.
    """
    depth = int(transformer_config["num_layers"])
    full = min(plan.full_blocks, depth)
    rest = depth - full
    few_full, few_rest = min(full, 2), min(rest, max(plan.stream_weights, 2))

    def run(num_rest: int, num_full: int) -> tuple[int, ...]:
        shape = {**transformer_config, "num_layers": num_rest + num_full}
        shallow = replace(plan, full_blocks=num_full, attention="math", compile=False)  # neither changes a byte
        return astuple(run_on_meta(shape, conventions, train, shallow, pack, dtype))

    base = run(few_rest, few_full)
    total = list(base)
    for missing, longer in ((rest - few_rest, (few_rest + 1, few_full)), (full - few_full, (few_rest, few_full + 1))):
        if missing:
            total = [size + missing * (more - less) for size, more, less in zip(total, run(*longer), base, strict=True)]
    return Prediction(*total)


def run_on_meta(
    transformer_config: Mapping[str, Any],
    conventions: Conventions,
    train: Train,
    plan: Plan,
    pack: Sequence[Bucket],
    dtype: torch.dtype,
) -> Prediction:
    """Return the memory of one step on `pack` by running a transformer of the whole depth."""
    clips = [blank_clip(bucket, conventions, dtype, META) for bucket in pack]
    targets = [torch.empty(clip.latents.shape, device=META)[:, : conventions.out_channels] for clip in clips]
    forget_tables()  # they count
    tally = Tally()
    with tally:
        with META:
            transformer = CogVideoXTransformer3DModel.from_config(dict(transformer_config))
            nn.Module.to(transformer.requires_grad_(False), dtype)
            add_adapter(transformer, train)
        transformer.train()
        engine = replace(open_engine(transformer, plan, META, tally.uncounted), attention_kernel=flash_on_meta)
        trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        moments = [torch.zeros_like(parameter) for parameter in trained for _ in range(2)]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        loaded = tally.peak_bytes = tally.num_bytes
        predictions = predict(transformer, clips, conventions, engine)
        loss = torch.stack([clip_loss(*pair) for pair in zip(predictions, targets, strict=True)]).sum()
        del predictions
        kept = tally.num_bytes - loaded
        torch.autograd.backward(loss)
    del moments
    forget_tables()  # they are on meta
    return Prediction(tally.peak_bytes, loaded, kept)


def flash_on_meta(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return attention's output by FlashAttention's own operation, which has a meta kernel."""
    output: Tensor = aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return output


class Tally(TorchDispatchMode):
    """A mode that counts every storage that an operation makes, until it is freed.

    The storage of `uncounted` is never counted, whatever is copied into it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = 0
        self.peak_bytes = 0
        self._counted: set[int] = set()
        self._results: dict[Any, tuple[type, list[Layout]]] = {}
        """Layouts of pure operations' results by arguments; meta kernels are slow."""
        self._paused = False

    def uncounted(self, num_bytes: int, device: torch.device) -> Tensor:
        """Return [num_bytes] uint8 on meta that stand for host memory."""
        self._paused = True
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)
        finally:
            self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
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
        if func is aten._scaled_dot_product_flash_attention_backward.default:
            sums = 4 * args[1].numel()  # the kernel sums the query's gradient in fp32
            self.peak_bytes = max(self.peak_bytes, self.num_bytes + sums)
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
    """Return what decides the layout of a result, hashable; add the storages of the argument to `given`."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        given.add(storage._cdata)
        return value.size(), value.stride(), value.dtype, value.device
    if isinstance(value, tuple | list):
        return tuple(_describe(part, given) for part in value)
    return type(value), value


def blank_clip(bucket: Bucket, conventions: Conventions, dtype: torch.dtype, device: torch.device) -> ModelInput:
    """Return a clip of zeros."""
    _, frames, height, width = latent_shape(bucket)
    frames += padding_frames(frames, conventions.patch_size_t)
    return ModelInput(
        torch.zeros(frames, conventions.in_channels, height, width, dtype=dtype, device=device),
        torch.zeros(conventions.text_length, conventions.text_embed_dim, dtype=dtype, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
    )

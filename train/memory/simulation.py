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
        clips = [blank_clip(bucket, conventions, dtype, META) for bucket in pack]
        targets = [torch.empty(clip.latents.shape, device=META)[:, : conventions.out_channels] for clip in clips]
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
        self._counting = True
        self._known: set[int] = set()

    def uncounted(self, num_bytes: int, device: torch.device) -> Tensor:
        """Return [num_bytes] uint8 on meta that stand for host memory."""
        self._counting = False
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)
        finally:
            self._counting = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor) and value.device.type == "meta":
                self._count(value.untyped_storage())
        if func is aten._scaled_dot_product_flash_attention_backward.default:
            sums = 4 * args[1].numel()  # the kernel sums the query's gradient in fp32
            self.peak_bytes = max(self.peak_bytes, self.num_bytes + sums)
        return result

    def _count(self, storage: UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            num_bytes = -(-storage.nbytes() // ROUNDING) * ROUNDING if self._counting else 0
            self._known.add(key)
            self.num_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.num_bytes)
            weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.num_bytes -= num_bytes


def blank_clip(bucket: Bucket, conventions: Conventions, dtype: torch.dtype, device: torch.device) -> ModelInput:
    """Return a clip of zeros."""
    _, frames, height, width = latent_shape(bucket)
    frames += padding_frames(frames, conventions.patch_size_t)
    return ModelInput(
        torch.zeros(frames, conventions.in_channels, height, width, dtype=dtype, device=device),
        torch.zeros(conventions.text_length, conventions.text_embed_dim, dtype=dtype, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
    )

"""Attention over a pack: full inside a clip, none across clips. The tokens of a clip are contiguous, text before video.

Every backend is one of torch's `scaled_dot_product_attention`, pinned for the whole run.
"""

import importlib.util
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)
from torch.nn.functional import scaled_dot_product_attention

from shared.errors import UsageError

logger = logging.getLogger(__name__)

AttentionKernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query, key and value [1,heads,S,head_dim] of one clip -> the same shape."""
RotaryTable = tuple[Tensor, Tensor]
"""cos and sin, [S,head_dim] each, fp32, every angle twice in a row."""

Backend = Literal["auto", "flash3", "cudnn", "flash", "efficient", "math"]
"""auto: torch's own choice for each clip. flash3: FlashAttention 3 in place of torch's own flash kernels."""
KERNELS = {
    "flash3": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
TRIAL_LENGTHS, TRIAL_LENGTHS_ON_GPU = (80, 261, 320), (80, 261, 320, 4276)
"""Tokens of the trial's clips. cuDNN has failed at lengths that are no multiple of 128 (pytorch issue 169849)."""
TRIAL_HEADS = 4
"""Heads of the trial, because "math" keeps all scores."""
TRIAL_TOLERANCE = 0.05
"""Relative to the largest value; bf16 kernels differ from each other by some 0.01."""


def rotate(tokens: Tensor, rotary: RotaryTable) -> Tensor:
    """Rotate neighboring channel pairs of `tokens` [S,heads,head_dim] by the angles of `rotary`, in fp32 or better.

    Source: diffusers `apply_rotary_emb` with `use_real_unbind_dim=-1`. A row with cos 1 and sin 0 stays as it is.
    """
    cos, sin = (table[:, None] for table in rotary)
    real, imaginary = tokens.view(*tokens.shape[:-1], -1, 2).unbind(-1)
    rotated = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    if tokens.dtype != torch.float64:
        return (tokens.float() * cos + rotated.float() * sin).to(tokens.dtype)
    return tokens * cos + rotated * sin


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    backend: Backend = "auto",
    kernel: AttentionKernel = scaled_dot_product_attention,
) -> Tensor:
    """Return attention's output [S,heads*head_dim] for [S,heads,head_dim] three times.

    `lengths` are the tokens of each clip and add up to S. `kernel` stands for torch's own where nothing is computed.
    """
    clips = zip(*(torch.split(part, list(lengths)) for part in (query, key, value)), strict=True)
    with pinned(backend):
        attended = [kernel(*(part.transpose(0, 1)[None] for part in clip)) for clip in clips]
    tokens_first = [heads[0].transpose(0, 1).flatten(1) for heads in attended]
    return tokens_first[0] if len(tokens_first) == 1 else torch.cat(tokens_first)


def pinned(backend: Backend) -> AbstractContextManager[None]:
    """Return a context in which torch's attention runs on `backend`, or fails."""
    return nullcontext() if backend == "auto" else sdpa_kernel(KERNELS[backend])


def choose_backend(wanted: Backend, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> Backend:
    """Return the backend of a run's attention: `wanted`, or for "auto" the fastest that works on `device`.

    A backend works when its output and gradients are close to those of "math", which always works. Raises `UsageError`
    if `wanted` does not.
    """
    # FlashAttention 3 and cuDNN are written for Hopper and later; before them FlashAttention 2 is faster
    newer = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    fused: tuple[Backend, ...] = ("flash3", "cudnn", "flash") if newer else ("flash", "cudnn")
    order: tuple[Backend, ...] = (*fused, "efficient", "math") if device.type == "cuda" else ("flash", "math")
    for backend in order if wanted == "auto" else (wanted,):
        if backend == "math" or (backend in order and works(backend, device, dtype, heads, head_dim)):
            if wanted == "auto" and backend == "math":
                logger.warning("attention: no fused kernel works on %s; 'math' keeps all scores in memory", device)
            return backend
    shape = f"{str(dtype).removeprefix('torch.')} with {heads} heads of {head_dim}"
    others = ", ".join(repr(name) for name in get_args(Backend) if name != wanted)
    raise UsageError(f"memory.attention = {wanted!r}: not available on {device} in {shape}; choose one of {others}")


def works(backend: Backend, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> bool:
    """Return whether output and gradients of a short pack are close to those of "math"."""
    if backend == "flash3" and not _activate_flash3():
        return False
    generator = torch.Generator(device).manual_seed(0)
    lengths = TRIAL_LENGTHS_ON_GPU if device.type == "cuda" else TRIAL_LENGTHS
    shape = (4, sum(lengths), min(heads, TRIAL_HEADS), head_dim)
    *inputs, gradient = torch.randn(shape, generator=generator, device=device).to(dtype)
    try:
        found, expected = (_output_and_gradients(name, inputs, gradient, lengths) for name in (backend, "math"))
    except RuntimeError:
        close = False
    else:
        pairs = zip(found, expected, strict=True)
        close = all(bool((one - other).abs().max() <= TRIAL_TOLERANCE * other.abs().max()) for one, other in pairs)
    if backend == "flash3" and not close:
        restore_flash_attention_impl()
    return close


def _output_and_gradients(
    backend: Backend, inputs: Sequence[Tensor], gradient: Tensor, lengths: Sequence[int]
) -> list[Tensor]:
    query, key, value = (part.detach().requires_grad_() for part in inputs)
    attended = attend(query, key, value, lengths, backend)
    return [attended.detach(), *torch.autograd.grad(attended, (query, key, value), gradient.flatten(1))]


def _activate_flash3() -> bool:
    """Register FlashAttention 3's kernels with torch; return False if the package flash-attn-3 is not usable."""
    if importlib.util.find_spec("flash_attn_interface") is None:
        return False
    try:
        activate_flash_attention_impl("FA3")
    except (ImportError, RuntimeError):  # built for another torch, or for inference alone
        return False
    return True

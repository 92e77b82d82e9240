"""Attention over a pack: full inside a clip, none across. Tokens of one clip are neighbours, text before video.

`attention_forward` and `attention_backward` are the two halves by hand, on torch's own kernels, so that the backward
pass needs the output and its logsumexp and never the forward again.
"""

import importlib.util
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)

from shared.errors import UsageError

RotaryTable = tuple[Tensor, Tensor]
"""cos and sin, [S,head_dim] each, fp32, every angle twice in a row."""

BACKENDS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
"""torch.nn.attention.SDPBackend by number."""

Backend = Literal["auto", "flash3", "cudnn", "flash", "efficient", "math"]
"""auto: what torch would choose, clip by clip. flash3: FlashAttention 3 in the place of torch's own flash kernels."""
KERNELS = {
    "flash3": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
PROBE_TOLERANCE = 0.05
"""Relative to the largest value; bf16 kernels differ from each other by some 0.01."""

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class AttentionState:
    """What one clip's backward needs beside query, key, value and output."""

    backend: str
    logsumexp: Tensor
    """[1,heads,S], fp32 (float64 on a float64 model)."""
    kernel: tuple[Any, ...] = ()
    """What the kernel's forward wants back in its backward: lengths and an unused random state."""


def rotate(tokens: Tensor, rotary: RotaryTable) -> Tensor:
    """Turn neighbouring channel pairs of `tokens` [S,heads,head_dim] by the angles of `rotary`, in fp32 or better.

    Source: diffusers `apply_rotary_emb` with `use_real_unbind_dim=-1`. A row with cos 1 and sin 0 is left as it is.
    """
    cos, sin = (table[:, None] for table in rotary)
    real, imaginary = tokens.reshape(*tokens.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    if tokens.dtype != torch.float64:
        return (tokens.float() * cos + turned.float() * sin).to(tokens.dtype)
    return tokens * cos + turned * sin


def pinned(backend: Backend) -> AbstractContextManager[None]:
    """Inside, torch's own attention runs on `backend`, or fails."""
    return nullcontext() if backend == "auto" else sdpa_kernel(KERNELS[backend])


def choose_backend(wanted: Backend, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> Backend:
    """The backend for all of a run's attention: `wanted`, or for "auto" the fastest that works here.

    What works is tried, forward and backward by hand, against plain arithmetic. Raises `UsageError` if `wanted` fails.
    """
    if device.type == "meta":
        return wanted
    # FlashAttention 3 and cuDNN are written for Hopper and later; before them FlashAttention 2 is ahead
    newer = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    fused: tuple[Backend, ...] = ("flash3", "cudnn", "flash") if newer else ("flash", "cudnn")
    order: tuple[Backend, ...] = (*fused, "efficient", "math") if device.type == "cuda" else ("flash", "math")
    for backend in order if wanted == "auto" else (wanted,):
        if backend in order and _works(backend, device, dtype, heads, head_dim):
            return backend
    shape = f"{str(dtype).removeprefix('torch.')} with {heads} heads of {head_dim}"
    others = ", ".join(repr(name) for name in get_args(Backend) if name != wanted)
    raise UsageError(f"memory.attention = {wanted!r}: not available on {device} in {shape}; the others: {others}")


def _put_flash3_in_place() -> bool:
    """Register FlashAttention 3's kernels with torch; False if its package, flash_attn_interface, is not there."""
    if importlib.util.find_spec("flash_attn_interface") is None:
        return False
    try:
        activate_flash_attention_impl("FA3")
    except (ImportError, RuntimeError):  # built for another torch, or for inference alone
        return False
    return True


def _works(backend: Backend, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> bool:
    """Forward and backward of one short clip, close to those of "math"."""
    if backend == "flash3":
        if not _put_flash3_in_place():
            return False
        works = _works("flash", device, dtype, heads, head_dim)
        if not works:
            restore_flash_attention_impl()
        return works
    generator = torch.Generator(device).manual_seed(0)
    draws = torch.randn(4, 80, heads, head_dim, generator=generator, device=device, dtype=torch.float32)
    query, key, value, gradient = draws.to(dtype)
    results: list[tuple[Tensor, ...]] = []
    for name in ("math", backend):
        try:
            attended, states = attention_forward(query, key, value, [80], name)
            pulled = attention_backward(gradient.flatten(1), query, key, value, attended, states, [80])
        except RuntimeError:
            return False
        results.append((attended, *pulled))
    return all(
        bool((ours - theirs).abs().max() <= PROBE_TOLERANCE * theirs.abs().max())
        for theirs, ours in zip(*results, strict=True)
    )


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], backend: Backend = "auto"
) -> tuple[Tensor, list[AttentionState]]:
    """[S,heads,head_dim] three times -> [S,heads*head_dim], outside autograd, and what `attention_backward` needs.

    `lengths` are the tokens of each clip and add up to S.
    """
    attended = torch.empty_like(query)
    states: list[AttentionState] = []
    for parts in _clips(lengths, query, key, value, attended):
        *inputs, result = (_heads_first(part) for part in parts)
        output, state = _forward(backend, *inputs)
        result.copy_(output)
        states.append(state)
    return attended.flatten(1), states


def attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attended: Tensor,
    states: Sequence[AttentionState],
    lengths: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients [S,heads,head_dim] for query, key and value from the gradient [S,heads*head_dim] for `attended`."""
    gradient, attended = gradient.view_as(query), attended.view_as(query)
    per_clip = [
        _backward(state, *(_heads_first(part) for part in parts))
        for state, parts in zip(states, _clips(lengths, gradient, query, key, value, attended), strict=True)
    ]
    if len(per_clip) == 1:  # nothing to join, nothing to copy
        query_gradient, key_gradient, value_gradient = (_tokens_first(part) for part in per_clip[0])
    else:
        query_gradient, key_gradient, value_gradient = (
            torch.cat([_tokens_first(part) for part in parts]) for parts in zip(*per_clip, strict=True)
        )
    return query_gradient, key_gradient, value_gradient


def _forward(wanted: Backend, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, AttentionState]:
    if query.device.type == "meta":
        lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
        return torch.empty_like(query), AttentionState("meta", lse)
    backend = attention_backend(query, key, value) if wanted == "auto" else wanted
    if backend == "flash" and query.device.type == "cpu":
        output, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
        return output, AttentionState("flash_cpu", lse)
    if backend in ("flash", "flash3"):
        output, lse, *kernel = aten._scaled_dot_product_flash_attention(query, key, value)[:8]
        return output, AttentionState("flash", lse, tuple(kernel))
    if backend == "cudnn":
        output, lse, *kernel = aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)[:8]
        return output, AttentionState(backend, lse, tuple(kernel))
    if backend == "efficient":
        output, lse, *kernel = aten._scaled_dot_product_efficient_attention(query, key, value, None, True)
        return output, AttentionState(backend, lse, tuple(kernel))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ value, AttentionState("math", lse)


def _backward(
    state: AttentionState, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    saved = (gradient, query, key, value, output, state.logsumexp)
    if state.backend == "meta":
        # the kernels sum the query's gradient in fp32
        sums = torch.empty_like(query, dtype=torch.float32)
        result = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
        del sums
        return result
    if state.backend == "flash_cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(*saved, 0.0, False)  # type: ignore[no-any-return]
    if state.backend == "flash":
        *lengths, seed, offset = state.kernel
        return aten._scaled_dot_product_flash_attention_backward(  # type: ignore[no-any-return]
            *saved, *lengths, 0.0, False, seed, offset
        )
    if state.backend == "cudnn":
        *lengths, seed, offset = state.kernel
        return aten._scaled_dot_product_cudnn_attention_backward(  # type: ignore[no-any-return]
            *saved, seed, offset, None, *lengths, 0.0, False
        )
    if state.backend == "efficient":
        needed = [True, True, True, False]
        result = aten._scaled_dot_product_efficient_attention_backward(
            gradient, query, key, value, None, output, state.logsumexp, *state.kernel, 0.0, needed
        )
        return result[:3]  # type: ignore[no-any-return]
    # softmax's own backward: dS = P * (dP - rowsum(dO * O)), as in the FlashAttention paper, section 3.1 and appendix B
    scaling = query.shape[-1] ** -0.5
    weights = (query @ key.transpose(-1, -2) * scaling - state.logsumexp[..., None]).exp()
    weights_gradient = gradient @ value.transpose(-1, -2) - (gradient * output).sum(-1, keepdim=True)
    scores_gradient = weights * weights_gradient * scaling
    return (
        scores_gradient @ key,
        scores_gradient.transpose(-1, -2) @ query,
        weights.transpose(-1, -2) @ gradient,
    )


def attention_backend(query: Tensor, key: Tensor, value: Tensor) -> str:
    """What torch's own attention would run for these [1,heads,S,head_dim]: flash, cudnn, efficient or math."""
    return BACKENDS.get(torch._fused_sdp_choice(query, key, value), "math")


def _clips(lengths: Sequence[int], *parts: Tensor) -> Any:
    return zip(*(torch.split(part, list(lengths)) for part in parts), strict=True)


def _heads_first(tokens: Tensor) -> Tensor:
    """[S,heads,head_dim] -> [1,heads,S,head_dim], which is what the attention kernels want."""
    return tokens.transpose(0, 1)[None]


def _tokens_first(heads: Tensor) -> Tensor:
    return heads[0].transpose(0, 1)

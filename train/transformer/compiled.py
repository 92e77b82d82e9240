"""The row-wise arithmetic around linear layers and attention, compiled: one kernel each instead of three to eight.

The compiled functions take tensors alone, so none has a graph break, and one version serves every block. The numbers of
tokens and of parts are dynamic: mixed packs do not recompile.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch import _dynamo as dynamo
from torch.nn import functional

from train.transformer.attention import RotaryTable, rotate

VERSIONS = 32
"""Limit of versions of one function: with and without gradients for each argument. torch's default is 8."""


class CompiledKernels:
    """The compiled functions, and the part of each token of the last pack; `compiled_kernels` keeps one instance."""

    def __init__(self, backend: str) -> None:
        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, VERSIONS)
        self._norm_and_modulate = _compiled(_norm_and_modulate, backend)
        self._add_gated = _compiled(_add_gated, backend)
        self._qk_norm_and_rope = _compiled(_qk_norm_and_rope, backend)
        self._lengths: list[int] = []
        self._parts: Tensor | None = None

    def norm_and_modulate(self, hidden: Tensor, norm: nn.LayerNorm, modulation: Tensor, lengths: list[int]) -> Tensor:
        """Compute `train.transformer.block.modulate`."""
        parts = self._part_of_token(lengths, hidden.device)
        return self._norm_and_modulate(hidden, norm.weight, norm.bias, norm.eps, modulation, parts)

    def add_gated(self, hidden: Tensor, update: Tensor, modulation: Tensor, lengths: list[int]) -> Tensor:
        """Compute `train.transformer.block.add_gated`."""
        return self._add_gated(hidden, update, modulation, self._part_of_token(lengths, hidden.device))

    def qk_norm_and_rope(self, tokens: Tensor, norm: nn.LayerNorm, rotary: RotaryTable | None) -> Tensor:
        """Compute `train.transformer.block.qk_norm_and_rope`."""
        return self._qk_norm_and_rope(tokens, norm.weight, norm.bias, norm.eps, rotary)

    def try_on(self, device: torch.device, dtype: torch.dtype) -> None:
        """Compile and run every function once, forward and backward. Raises whatever the compiler raises."""
        hidden = torch.ones(4, 64, device=device, dtype=dtype, requires_grad=True)
        norm = nn.LayerNorm(64, device=device, dtype=dtype).requires_grad_(False)
        modulation = torch.ones(2, 3, 64, device=device, dtype=dtype)
        table = torch.ones(4, 64, device=device)
        normed = self.norm_and_modulate(hidden, norm, modulation, [2, 2])
        rotated = self.qk_norm_and_rope(normed[:, None], norm, (table, table))[:, 0]
        torch.autograd.backward(self.add_gated(hidden, rotated, modulation, [2, 2]).sum())

    def _part_of_token(self, lengths: list[int], device: torch.device) -> Tensor:
        """Return the part of each token, [S] int64; kept, because every block of a step asks for the same."""
        if self._parts is None or self._parts.device != device or lengths != self._lengths:
            on_host = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
            self._lengths, self._parts = list(lengths), on_host.to(device, non_blocking=True)
        return self._parts


@lru_cache
def compiled_kernels(backend: str = "inductor") -> CompiledKernels:
    """Return the kernels of this process; they serve every run in it."""
    return CompiledKernels(backend)


def _compiled(function: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    compiled = torch.compile(function, dynamic=True, fullgraph=True, backend=backend)

    def call(*arguments: Any) -> Tensor:
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in arguments):
            return compiled(*arguments)
        # one version instead of several: the origin of these tensors and the gradient mode make no difference
        with torch.no_grad():
            return compiled(*(value.detach() if isinstance(value, Tensor) else value for value in arguments))

    return call


def _norm_and_modulate(
    hidden: Tensor, weight: Tensor, bias: Tensor, epsilon: float, modulation: Tensor, parts: Tensor
) -> Tensor:
    normed = functional.layer_norm(hidden, weight.shape, weight, bias, epsilon)
    return normed * (1 + modulation[:, 1])[parts] + modulation[:, 0][parts]


def _add_gated(hidden: Tensor, update: Tensor, modulation: Tensor, parts: Tensor) -> Tensor:
    return hidden + modulation[:, 2][parts] * update


def _qk_norm_and_rope(
    tokens: Tensor, weight: Tensor, bias: Tensor, epsilon: float, rotary: RotaryTable | None
) -> Tensor:
    normed = functional.layer_norm(tokens, weight.shape, weight, bias, epsilon)
    return normed if rotary is None else rotate(normed, rotary)

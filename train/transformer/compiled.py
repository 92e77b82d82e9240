"""The row-wise arithmetic around linear layers and attention, compiled: one kernel each instead of three to eight.

The compiled functions take tensors alone, so none has a graph break, and one version serves every block. The numbers of
tokens and of parts are dynamic: mixed packs do not recompile.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch import _dynamo as dynamo
from torch.nn import functional

from train.transformer.attention import RotaryTable, rotate

VERSIONS = 32
"""Limit of versions of one function: with and without gradients for each argument. torch's default is 8."""


@dataclass(frozen=True, slots=True)
class CompiledKernels:
    """The compiled functions; `train.transformer.block` says what they compute."""

    norm_and_modulate: Callable[..., Tensor]
    add_gated: Callable[..., Tensor]
    qk_norm_and_rope: Callable[..., Tensor]

    def try_on(self, device: torch.device, dtype: torch.dtype) -> None:
        """Compile and run every function once, forward and backward. Raises whatever the compiler raises."""
        hidden = torch.ones(4, 64, device=device, dtype=dtype, requires_grad=True)
        weight, modulation = (torch.ones(*shape, device=device, dtype=dtype) for shape in ((64,), (2, 3, 64)))
        table, parts = torch.ones(4, 64, device=device), torch.zeros(4, dtype=torch.int64, device=device)
        normed = self.norm_and_modulate(hidden, weight, weight, 1e-5, modulation, parts)
        rotated = self.qk_norm_and_rope(normed[:, None], weight, weight, 1e-5, (table, table))[:, 0]
        torch.autograd.backward(self.add_gated(hidden, rotated, modulation, parts).sum())


@lru_cache
def compiled_kernels(backend: str = "inductor") -> CompiledKernels:
    """Return the functions of this process; they serve every run in it."""
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, VERSIONS)
    functions = (_norm_and_modulate, _add_gated, _qk_norm_and_rope)
    return CompiledKernels(*(_compiled(function, backend) for function in functions))


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

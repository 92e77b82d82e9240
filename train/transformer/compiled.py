"""The row-wise arithmetic around linear layers and attention, compiled: one kernel each instead of three to eight.

Everything here takes tensors alone, so a compiled function has no graph break, serves every block, and knows the number
of tokens and of parts as a variable: mixed packs do not compile anew.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch import _dynamo as dynamo
from torch.nn import functional

from train.transformer.attention import RotaryTable, rotate

VERSIONS = 32
"""Of one function: with and without gradients for each argument, whole tensors and slices. torch stops at 8."""


class Fused:
    """The compiled functions and the last pack's parts; `fused_for` keeps one for the process."""

    def __init__(self, backend: str) -> None:
        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, VERSIONS)
        self.normalize_and_modulate = _compiled(normalize_and_modulate, backend)
        self.add_gated = _compiled(add_gated, backend)
        self.normalize_and_turn = _compiled(normalize_and_turn, backend)
        self._lengths: list[int] = []
        self._parts: Tensor | None = None

    def part_of_token(self, lengths: list[int], device: torch.device) -> Tensor:
        """[S] int64, the part that each token belongs to; remembered, since every block of a step asks for the same."""
        if self._parts is None or self._parts.device != device or lengths != self._lengths:
            on_host = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
            self._lengths, self._parts = list(lengths), on_host.to(device, non_blocking=True)
        return self._parts


@lru_cache
def fused_for(backend: str = "inductor") -> Fused:
    """What one run of this process compiled serves the next."""
    return Fused(backend)


def _compiled(function: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    compiled = torch.compile(function, dynamic=True, fullgraph=True, backend=backend)

    def call(*arguments: Any) -> Tensor:
        if any(isinstance(value, Tensor) and value.requires_grad for value in arguments):
            return compiled(*arguments)
        # one version instead of several: who made these tensors, and whether gradients are on, makes no difference
        with torch.no_grad():
            return compiled(*(value.detach() if isinstance(value, Tensor) else value for value in arguments))

    return call


def normalize_and_modulate(
    hidden: Tensor, weight: Tensor, bias: Tensor, epsilon: float, rows: Tensor, parts: Tensor
) -> Tensor:
    """LayerNorm(hidden [S,D]) * (1 + scale) + shift, with (shift, scale, gate) of each token's part in `rows`."""
    normed = functional.layer_norm(hidden, weight.shape, weight, bias, epsilon)
    return normed * (1 + rows[:, 1])[parts] + rows[:, 0][parts]


def add_gated(hidden: Tensor, update: Tensor, rows: Tensor, parts: Tensor) -> Tensor:
    """hidden + gate * update on [S,D]."""
    return hidden + rows[:, 2][parts] * update


def normalize_and_turn(
    tokens: Tensor, weight: Tensor, bias: Tensor, epsilon: float, rotary: RotaryTable | None
) -> Tensor:
    """[S,heads,head_dim], normalized per head and turned to their positions."""
    normed = functional.layer_norm(tokens, weight.shape, weight, bias, epsilon)
    return normed if rotary is None else rotate(normed, rotary)

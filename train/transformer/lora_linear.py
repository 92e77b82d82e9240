"""A linear layer with its adapters: forward, and the backward of a forward whose result is known already."""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional

from shared.model.quantize import QuantizedLinear


def linear(layer: LoraLinear, tokens: Tensor) -> Tensor:
    """A linear layer (torch's, or peft's around it) with its adapters, in the dtype of `tokens` [...,D].

    Plain LoRA computes with copies of the fp32 masters cast to that dtype; peft itself would cast `tokens` up instead.
    Everything else (DoRA, merged or disabled adapters) is peft's own forward.
    """
    if not _is_plain_lora(layer):
        result: Tensor = layer(tokens)
        return result
    result = layer.base_layer(tokens)
    for down, up, scaling in _low_rank(layer, tokens):
        result = result + functional.linear(down, up) * scaling
    return result


def known_linear(layer: LoraLinear, tokens: Tensor, known: Tensor | None) -> Tensor:
    """`linear(layer, tokens)` with the gradient it has, its value `known` [S,out] instead of computed.

    `known` None says that nobody reads the value, only the gradient. Layers that are neither plain nor plain LoRA are
    computed after all.
    """
    plain_lora = _is_plain_lora(layer)
    base = layer.base_layer if isinstance(layer, LoraLinear) else layer
    if not (plain_lora or layer is base) or not isinstance(base, nn.Linear | QuantizedLinear):
        return linear(layer, tokens)
    if known is None:
        known = tokens.new_zeros(()).expand(*tokens.shape[:-1], base.out_features)
    adapters = _low_rank(layer, tokens) if isinstance(layer, LoraLinear) else []
    scalings = [scaling for *_, scaling in adapters]
    factors = [factor for down, up, _ in adapters for factor in (down, up)]
    result: Tensor = _Known.apply(known, base, scalings, tokens, *factors)  # type: ignore[no-untyped-call]
    return result


def with_value(computed: Tensor, value: Tensor) -> Tensor:
    """`value`, with the gradient of `computed`."""
    result: Tensor = _WithValue.apply(computed, value)  # type: ignore[no-untyped-call]
    return result


def frozen_weight(layer: nn.Linear | QuantizedLinear, dtype: torch.dtype) -> Tensor:
    """[out,in], widened if it is stored small."""
    return layer.dequantized(dtype) if isinstance(layer, QuantizedLinear) else layer.weight


class _WithValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, computed: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Known(torch.autograd.Function):
    """base(tokens) + sum of scaling * up(down), forward given, backward for tokens, down and up."""

    @staticmethod
    def forward(
        ctx: Any,
        known: Tensor,
        base: nn.Linear | QuantizedLinear,
        scalings: Sequence[float],
        tokens: Tensor,
        *factors: Tensor,
    ) -> Tensor:
        ctx.base, ctx.scalings = base, scalings
        ctx.save_for_backward(*factors)
        return known.view_as(known)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        factors = ctx.saved_tensors
        tokens_gradient = gradient @ frozen_weight(ctx.base, gradient.dtype) if ctx.needs_input_grad[3] else None
        factor_gradients: list[Tensor] = []
        for down, up, scaling in zip(factors[::2], factors[1::2], ctx.scalings, strict=True):
            scaled = gradient * scaling
            factor_gradients += [scaled @ up, scaled.flatten(0, -2).T @ down.flatten(0, -2)]
        return None, None, None, tokens_gradient, *factor_gradients


def _low_rank(layer: LoraLinear, tokens: Tensor) -> list[tuple[Tensor, Tensor, float]]:
    """Of every active adapter: dropped-out tokens through A, the weight B, the scaling; in the dtype of `tokens`."""
    adapters = []
    for name in layer.active_adapters:
        if name in layer.lora_A:
            down, up = (weights[name].weight.to(tokens.dtype) for weights in (layer.lora_A, layer.lora_B))
            dropped = layer.lora_dropout[name](tokens)
            adapters.append((functional.linear(dropped, down), up, float(layer.scaling[name])))
    return adapters


def _is_plain_lora(layer: LoraLinear) -> bool:
    return (
        type(layer) is LoraLinear
        and not (layer.disable_adapters or layer.merged or layer.lora_variant)
        and not any(layer.lora_bias.values())
    )

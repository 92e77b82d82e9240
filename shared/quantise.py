"""Linear layers in eight bits: weight-only storage, one scale per output row, widened when it is used."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Int8Linear(nn.Module):
    """A frozen linear layer whose weight is round(w / scale) in int8, scale = largest |w| of the output row / 127."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        wide = layer.weight.detach().float()
        scale = wide.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
        self.weight = nn.Parameter((wide / scale).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale.to(layer.weight.dtype), requires_grad=False)
        self.bias = layer.bias

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """[out,in] in `dtype`."""
        return self.weight.to(dtype) * self.scale.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = _Widened.apply(tokens, self)  # type: ignore[no-untyped-call]
        return result


class _Widened(torch.autograd.Function):
    """The wide weight lives for one product, forward or backward, and is never saved."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, layer: Int8Linear) -> Tensor:
        ctx.layer = layer
        return functional.linear(tokens, layer.dequantised(tokens.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.dequantised(gradient.dtype), None

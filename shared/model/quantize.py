"""Linear layers stored in eight bits: weight-only quantization, widened for each product."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Storage = Literal["int8", "fp8"]

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {"int8": 127.0, "fp8": 448.0}
"""Largest number of each storage type."""


class QuantizedLinear(nn.Module):
    """A frozen linear layer with an eight-bit `weight` [out,in] and one `scale` [out,1] per row.

    The scale maps the row's largest absolute weight to the type's largest number. For fp8 (e4m3) the scale is rounded
    up to a power of two, so that widening is exact.
    """

    def __init__(self, layer: nn.Linear, storage: Storage = "int8") -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        wide = layer.weight.detach().float()
        scale = wide.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / LARGEST[storage]
        if storage == "fp8":
            scale = scale.log2().ceil().exp2()
        narrow = wide / scale
        narrow = (narrow.round() if storage == "int8" else narrow).to(DTYPES[storage])
        self.weight = nn.Parameter(narrow, requires_grad=False)
        self.scale = nn.Parameter(scale.to(layer.weight.dtype), requires_grad=False)
        self.bias = layer.bias

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [out,in] widened to `dtype`."""
        return self.weight.to(dtype).mul_(self.scale.to(dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the layer's output [...,out] for `tokens` [...,in]."""
        return functional.linear(tokens, self.dequantized(tokens.dtype), self.bias)

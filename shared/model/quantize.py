"""Linear layers in eight or four bits: weight-only storage, widened when it is used."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Storage = Literal["int8", "fp8", "nf4"]

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Of each type with one scale per output row."""
NF4_BLOCK = 64
"""Weights that share a scale, along the rows."""


class QuantizedLinear(nn.Module):
    """A frozen linear layer with a small `weight` and the `scale` that widens it.

    int8 and fp8 (e4m3): one scale per output row, which takes the row's largest |w| to the type's largest number. In
    fp8 it is rounded up to a power of two, so that widening is exact. nf4 (arXiv 2305.14314): two weights to a byte,
    one fp32 scale per 64 of them; the kernels are those of bitsandbytes.
    """

    def __init__(self, layer: nn.Linear, storage: Storage = "int8") -> None:
        super().__init__()
        self.in_features, self.out_features, self.storage = layer.in_features, layer.out_features, storage
        wide = layer.weight.detach().float()
        if storage == "nf4":
            weight, scale = _store_nf4(wide)
        else:
            dtype = torch.int8 if storage == "int8" else torch.float8_e4m3fn
            scale = wide.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / LARGEST[dtype]
            if storage == "fp8":
                scale = scale.log2().ceil().exp2()
            weight = wide / scale
            weight = (weight.round() if storage == "int8" else weight).to(dtype)
            scale = scale.to(layer.weight.dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = layer.bias

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """[out,in] in `dtype`."""
        if self.storage == "nf4":
            return _widen_nf4(self.weight.data, self.scale.data, (self.out_features, self.in_features), dtype)
        return self.weight.data.to(dtype).mul_(self.scale.to(dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = _Widened.apply(tokens, self)  # type: ignore[no-untyped-call]
        return result


class _Widened(torch.autograd.Function):
    """The wide weight lives for one product, forward or backward, and is never saved."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return functional.linear(tokens, layer.dequantized(tokens.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.dequantized(gradient.dtype), None


def _store_nf4(wide: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [out,in] -> uint8 [out*in/2,1] and the scales [out*in/64]. On meta, bitsandbytes need not be there."""
    if wide.device.type == "meta":
        num_weights = wide.numel()
        packed = torch.empty(-(-num_weights // 2), 1, dtype=torch.uint8, device="meta")
        return packed, torch.empty(-(-num_weights // NF4_BLOCK), device="meta")
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(wide, blocksize=NF4_BLOCK, quant_type="nf4")
    return packed, state.absmax


def _widen_nf4(packed: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    if packed.device.type == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    from bitsandbytes.functional import QuantState, dequantize_4bit

    # the kernels know 16 and 32 bits
    known = dtype if dtype.itemsize < 8 else torch.float32
    state = QuantState(scale, shape=torch.Size(shape), dtype=known, blocksize=NF4_BLOCK, quant_type="nf4")
    wide: Tensor = dequantize_4bit(packed, state)
    return wide.to(dtype)

"""A linear layer with its LoRA adapters, in the dtype of the activations."""

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor

from shared.model.quantize import QuantizedLinear


def linear(layer: LoraLinear, tokens: Tensor) -> Tensor:
    """Return the output [S,out] of a linear layer (torch's, or peft's around it) with its adapter.

    Plain LoRA casts the fp32 masters to the dtype of `tokens` [S,in]; peft itself would cast `tokens` up. The adapter
    comes first, and the base product adds it in its own kernel, so the sum costs no pass over [S,out]. Everything
    else (DoRA, biases, several, merged or disabled adapters) is peft's own forward.
    """
    if not _is_plain_lora(layer):
        result: Tensor = layer(tokens)
        return result
    base, (name,) = layer.base_layer, layer.active_adapters
    narrow, wide = (weights[name].weight.to(tokens.dtype) for weights in (layer.lora_A, layer.lora_B))
    projected, scaling = layer.lora_dropout[name](tokens) @ narrow.T, float(layer.scaling[name])
    if base.bias is None:
        added = (projected * scaling) @ wide.T
    else:
        added = torch.addmm(base.bias, projected, wide.T, alpha=scaling)
    weight = base.dequantized(tokens.dtype) if isinstance(base, QuantizedLinear) else base.weight
    return torch.addmm(added, tokens, weight.T)


def _is_plain_lora(layer: LoraLinear) -> bool:
    return (
        type(layer) is LoraLinear
        and len(layer.active_adapters) == 1
        and not (layer.disable_adapters or layer.merged or layer.lora_variant)
        and not any(layer.lora_bias.values())
    )

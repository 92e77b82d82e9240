"""The frozen base in eight or four bits."""

import torch
from diffusers import CogVideoXTransformer3DModel
from peft.tuners.lora import LoraLayer
from torch import nn

from shared.quantise import QuantisedLinear, Storage


def quantise_blocks(transformer: CogVideoXTransformer3DModel, storage: Storage, device: torch.device) -> None:
    """Store the attention and feed-forward layers of every block small, below their adapters; all else stays.

    Norms, embeddings, modulation and the output projection are few bytes or sensitive. Each layer visits `device`,
    which is fast at it, and comes back to where it was.
    """
    for block in transformer.transformer_blocks:
        for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"):
            layer = block.get_submodule(name)
            if isinstance(layer, LoraLayer):
                name = f"{name}.base_layer"
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear), f"{name} is a {type(linear).__name__}"
            home = linear.weight.device
            block.set_submodule(name, QuantisedLinear(linear.to(device), storage).to(home))

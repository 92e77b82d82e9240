"""The frozen base in eight bits."""

from diffusers import CogVideoXTransformer3DModel
from peft.tuners.lora import LoraLayer
from torch import nn

from shared.quantise import Int8Linear


def quantise_blocks(transformer: CogVideoXTransformer3DModel) -> None:
    """Put the attention and feed-forward layers of every block in int8, below their adapters; all else stays as it is.

    Norms, embeddings, modulation and the output projection are few bytes or sensitive.
    """
    for block in transformer.transformer_blocks:
        for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"):
            layer = block.get_submodule(name)
            if isinstance(layer, LoraLayer):
                name = f"{name}.base_layer"
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear), f"{name} is a {type(linear).__name__}"
            block.set_submodule(name, Int8Linear(linear))

"""How the blocks are run: what they keep for the backward pass, and what stays off the device meanwhile."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import CogVideoXTransformer3DModel
from peft.tuners.lora import LoraLayer
from torch import nn

from shared.model.quantize import QuantizedLinear, Storage
from train.transformer.attention import Backend, choose_backend
from train.transformer.compiled import Fused, fused_for
from train.transformer.modulation import ModulationTable
from train.transformer.weight_streaming import ActivationOffload, WeightStream, frozen_weights

Activations = Literal["block_input", "attention_output", "full"]


@dataclass(frozen=True, slots=True)
class Plan:
    """The fields of [memory] with every "auto" decided."""

    activations: Activations = "full"
    offload_activations: bool = False
    stream_weights: int = 0
    modulation_table: bool = False
    chunk_tokens: int = 4096
    base_precision: Literal["model"] | Storage = "model"
    attention: Backend = "auto"
    compile: bool = False


@dataclass(frozen=True, slots=True)
class Engine:
    """By default everything stays on the device and nothing that costs a matrix product is computed again."""

    activations: Activations = "full"
    chunk_tokens: int = 4096
    """Tokens that the layers around attention work on at a time."""
    modulation: ModulationTable | None = None
    weights: WeightStream | None = None
    offload: ActivationOffload | None = None
    attention: Backend = "auto"
    fused: Fused | None = None

    def __post_init__(self) -> None:
        assert self.chunk_tokens > 0

    def block_weights(self, index: int, next_index: int) -> AbstractContextManager[None]:
        """Inside, the weights of block `index` are on the device; those of `next_index` may be on their way."""
        return nullcontext() if self.weights is None else self.weights.resident(index, next_index)


EVERYTHING_RESIDENT = Engine()


def open_engine(transformer: CogVideoXTransformer3DModel, plan: Plan, device: torch.device) -> Engine:
    """Bring a transformer from the CPU to `device`, but for what `plan` leaves in host memory.

    The base is quantized in place if the plan says so.
    """
    if plan.base_precision != "model":
        quantize_blocks(transformer, plan.base_precision, device)
    modulation = ModulationTable(transformer, device) if plan.modulation_table else None
    weights = WeightStream(transformer, plan.stream_weights, device) if plan.stream_weights else None
    stays: set[int] = set()
    for block in transformer.transformer_blocks:
        if modulation is not None:
            stays |= {id(value) for norm in (block.norm1, block.norm2) for value in norm.linear.parameters()}
        if weights is not None:
            stays |= set(map(id, frozen_weights(block)))
    for value in transformer.parameters():
        if id(value) not in stays:
            value.data = value.data.to(device)
    for value in transformer.buffers():
        value.data = value.data.to(device)
    offload = ActivationOffload(device) if plan.offload_activations else None
    shape = transformer.config
    attention = choose_backend(
        plan.attention, device, transformer.dtype, shape.num_attention_heads, shape.attention_head_dim
    )
    fused = fused_for() if plan.compile and device.type != "meta" else None  # fused or not, the same tensors live
    return Engine(plan.activations, plan.chunk_tokens, modulation, weights, offload, attention, fused)


def quantize_blocks(transformer: CogVideoXTransformer3DModel, storage: Storage, device: torch.device) -> None:
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
            block.set_submodule(name, QuantizedLinear(linear.to(device), storage).to(home))

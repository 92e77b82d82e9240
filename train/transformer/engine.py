"""The engine that runs the blocks: what they keep for the backward pass, and what is off the device meanwhile."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import CogVideoXTransformer3DModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from shared.host_memory import HostAllocator, host_empty
from shared.model.quantize import QuantizedLinear, Storage
from train.transformer.activation_offload import ActivationOffload
from train.transformer.attention import AttentionKernel, Backend, attend, choose_backend
from train.transformer.compiled import CompiledKernels, compiled_kernels
from train.transformer.weight_streaming import WeightStream, frozen_weights, modulation_weights

Activations = Literal["block_input", "attention_output", "full"]
QUANTIZED = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
"""Layers of a block that are stored in eight bits; norms, embeddings and modulation are few bytes or sensitive."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The fields of [memory] with every "auto" decided."""

    activations: Activations = "full"
    full_blocks: int = 0
    """Blocks, counted from the last, that keep `full` whatever `activations` says."""
    offload_activations: bool = False
    """Also leaves the modulation layers in host memory, as `stream_weights` does with all of a block's layers."""
    stream_weights: int = 0
    base_precision: Literal["model"] | Storage = "model"
    attention: Backend = "auto"
    compile: bool = False


@dataclass(frozen=True, slots=True)
class Engine:
    """An opened plan. By default everything stays on the device, and only element-wise work is recomputed."""

    activations: Activations = "full"
    first_full_block: int | None = None
    """The block from which on all keep `full`; they are the first whose memory the backward pass frees."""
    weights: WeightStream | None = None
    offload: ActivationOffload | None = None
    attention: Backend = "auto"
    kernels: CompiledKernels | None = None
    attention_kernel: AttentionKernel = scaled_dot_product_attention
    """The memory simulation sets another, whose result has no values."""

    def level(self, index: int) -> Activations:
        """Return what the block at `index` keeps."""
        return "full" if self.first_full_block is not None and index >= self.first_full_block else self.activations

    def attend(self, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return `train.transformer.attention.attend` with this engine's backend."""
        return attend(query, key, value, lengths, self.attention, self.attention_kernel)


EVERYTHING_RESIDENT = Engine()


def open_engine(
    transformer: CogVideoXTransformer3DModel,
    plan: Plan,
    device: torch.device,
    allocate: HostAllocator = host_empty,
) -> Engine:
    """Bring a transformer from the CPU to `device`, but for what `plan` leaves in host memory.

    The base is quantized in place if the plan says so. Raises `UsageError` if the plan's attention does not work here.
    """
    if plan.base_precision != "model":
        quantize_blocks(transformer, plan.base_precision, device)
    weights, streamed = None, set[int]()
    if plan.stream_weights or plan.offload_activations:
        select = frozen_weights if plan.stream_weights else modulation_weights
        selected = [select(block) for block in transformer.transformer_blocks]
        weights = WeightStream(selected, plan.stream_weights or 2, device, allocate)
        streamed = {id(value) for of_block in selected for value in of_block}
    for value in (*transformer.parameters(), *transformer.buffers()):
        if id(value) not in streamed:
            value.data = value.data.to(device)
    shape = transformer.config
    return Engine(
        plan.activations,
        shape.num_layers - plan.full_blocks,
        weights,
        ActivationOffload(device, allocate) if plan.offload_activations else None,
        choose_backend(plan.attention, device, transformer.dtype, shape.num_attention_heads, shape.attention_head_dim),
        compiled_kernels() if plan.compile else None,
    )


def quantize_blocks(transformer: CogVideoXTransformer3DModel, storage: Storage, device: torch.device) -> None:
    """Store the attention and feed-forward layers of every block in eight bits, below their adapters.

    Each layer is quantized on `device`, which is fast, and returns to its own device.
    """
    for block in transformer.transformer_blocks:
        for name in QUANTIZED:
            if isinstance(block.get_submodule(name), LoraLayer):
                name = f"{name}.base_layer"
            layer = block.get_submodule(name)
            if isinstance(layer, QuantizedLinear):  # by an engine that was opened before
                continue
            assert isinstance(layer, nn.Linear), f"{name} is a {type(layer).__name__}"
            home = layer.weight.device
            block.set_submodule(name, QuantizedLinear(layer.to(device), storage).to(home))

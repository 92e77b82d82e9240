"""Choice of the weights that wait in host memory while sampling, by the device's free memory."""

import math
from typing import Any

import torch
from accelerate import cpu_offload
from torch import nn

from shared.config import Sampling
from shared.console import bytes_text
from shared.model.conventions import Conventions
from shared.model.geometry import Bucket
from shared.model.quantize import QuantizedLinear, Storage

DENOISE_VALUES = 13
"""Live values per token and unit of width in diffusers' forward; `bench/sample_memory.py` counts them."""
DECODE_VALUES = 22_900
"""Live values per decoded pixel of the published VAE, whatever the number of frames; counted there too."""
RESERVE_BYTES = 2**30
"""For the CUDA context and what the allocator cannot use."""


def quantize(module: nn.Module, storage: Storage) -> None:
    """Store the linear layers of the blocks in eight bits; adapters keep their precision."""
    for name, layer in list(module.named_modules()):
        if type(layer) is nn.Linear and ".lora_" not in name:
            module.set_submodule(name, QuantizedLinear(layer, storage))


def needed_bytes(pipeline: Any, settings: Sampling, conventions: Conventions, tiled: bool) -> dict[str, int]:
    """Return the most bytes on the device in each mode, from the least to the most saving one.

    Weights are counted, activations estimated. T5 is not in the pipeline: it has left the device before.
    """
    transformer, vae = pipeline.transformer, pipeline.vae
    itemsize = transformer.dtype.itemsize
    blocks = [weight_bytes(block) for block in transformer.transformer_blocks]
    all_blocks, decoder = weight_bytes(transformer), weight_bytes(vae)
    denoise, decode = activation_bytes(pipeline, settings, conventions, tiled, itemsize)
    around = all_blocks - sum(blocks) + 2 * max(blocks)  # the next block is fetched while one runs
    return {
        "none": all_blocks + decoder + max(denoise, decode),
        "model_offload": max(all_blocks + denoise, decoder + decode),
        "group_offload": decoder + max(around + denoise, decode),
        "sequential_offload": max(largest_layer(transformer) + denoise, largest_layer(vae) + decode),
    }


def activation_bytes(
    pipeline: Any, settings: Sampling, conventions: Conventions, tiled: bool, itemsize: int
) -> tuple[int, int]:
    """Return the bytes that a denoising step and the VAE's decoding take beside the weights."""
    bucket = Bucket(settings.num_frames, settings.height, settings.width)
    tokens = conventions.num_tokens(bucket)
    heads, vae = pipeline.transformer.config.num_attention_heads, pipeline.vae
    batch = 2 if settings.guidance_scale > 1 else 1
    values = DENOISE_VALUES * batch * tokens * heads * conventions.attention_head_dim
    pixels = settings.height * settings.width
    if tiled:
        pixels = min(pixels, vae.tile_sample_min_height * vae.tile_sample_min_width)
    share = vae.config.block_out_channels[0] / 128
    frames_out = 3 * settings.num_frames * settings.height * settings.width
    return values * itemsize, int(DECODE_VALUES * share * pixels + frames_out) * itemsize


def choose_memory(needed: dict[str, int], free: float) -> tuple[str, str]:
    """Return the fastest mode that fits into the free bytes, else the leanest, and the reason in words."""
    room = free - RESERVE_BYTES
    mode = next((name for name, size in needed.items() if size <= room), list(needed)[-1])
    shown = ", ".join(f"{name} {bytes_text(size)}" for name, size in needed.items())
    return mode, f"{bytes_text(free)} free, less {bytes_text(RESERVE_BYTES)} reserve; {shown}"


def place(pipeline: Any, mode: str, device: torch.device) -> None:
    """Put the pipeline on the device, or let diffusers fetch its weights when they are needed."""
    if mode == "model_offload":
        pipeline.enable_model_cpu_offload(device=device)
    elif mode == "sequential_offload":
        for module in (part for part in pipeline.components.values() if isinstance(part, nn.Module)):
            cpu_offload(module, device, offload_buffers=len(module._parameters) > 0)
    elif mode == "group_offload":
        pipeline.enable_group_offload(
            onload_device=device,
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=device.type == "cuda",
            exclude_modules="vae",  # whose decode is not a forward, which the hooks wait for
        )
        if getattr(pipeline, "vae", None) is not None:
            pipeline.vae.to(device)
    elif device.type != "cpu":  # where the pipeline is already; diffusers warns of fp16 there
        pipeline.to(device)


def free_bytes(device: torch.device) -> float:
    """Return the free bytes of a GPU; the CPU has no limit."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers."""
    return sum(value.nbytes for value in (*module.parameters(), *module.buffers()))


def largest_layer(module: nn.Module) -> int:
    """Return the bytes of the largest module without children."""
    return max(weight_bytes(layer) for layer in module.modules() if not any(True for _ in layer.children()))

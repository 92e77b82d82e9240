"""Transformers of the published sizes with random weights, built where they are used; nothing is downloaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from torch import nn

from shared.config import Train
from shared.model.conventions import Conventions, read_conventions
from shared.model.geometry import Bucket, latent_shape, padding_frames
from train.data.example import ModelInput
from train.transformer.load import add_adapter

_COMMON: dict[str, Any] = {
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "time_embed_dim": 512,
    "text_embed_dim": 4096,
    "max_text_seq_length": 226,
    "patch_size": 2,
    "sample_height": 60,
    "sample_width": 90,
    "sample_frames": 49,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "2b": _COMMON | {"num_attention_heads": 30, "num_layers": 30, "use_rotary_positional_embeddings": False},
    "5b": _COMMON | {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
    "1.5-5b": _COMMON
    | {
        "num_attention_heads": 48,
        "num_layers": 42,
        "use_rotary_positional_embeddings": True,
        "max_text_seq_length": 224,
        "patch_size_t": 2,
        "patch_bias": False,
        "sample_height": 300,
        "sample_width": 300,
        "sample_frames": 81,
    },
}
"""`transformer/config.json` of THUDM/CogVideoX-2b, CogVideoX-5b and CogVideoX1.5-5B, as far as sizes go."""
SMALL = PUBLISHED["5b"] | {"num_attention_heads": 6, "num_layers": 4, "text_embed_dim": 128, "max_text_seq_length": 32}


def published_conventions(variant: str) -> Conventions:
    """Return the conventions of the published model."""
    return conventions_for(PUBLISHED[variant])


def build_small(dtype: torch.dtype, device: torch.device) -> tuple[CogVideoXTransformer3DModel, Conventions]:
    """Build a 5B with 6 heads and 4 blocks."""
    return build(SMALL, dtype, device, lora_rank=16), conventions_for(SMALL)


def build(
    transformer_config: dict[str, Any], dtype: torch.dtype, device: torch.device, lora_rank: int
) -> CogVideoXTransformer3DModel:
    """Build a transformer with random weights (std 0.02) on `device`, and an adapter whose B is not zero."""
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel.from_config(transformer_config)
    transformer.requires_grad_(False)
    nn.Module.to(transformer, dtype)
    nn.Module.to_empty(transformer, device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, value in transformer.named_parameters():
        value.data.normal_(0, 0.02, generator=generator)
        if "norm" in name and name.endswith("weight") and value.ndim == 1:
            value.data += 1
    if transformer_config["use_rotary_positional_embeddings"] is False:
        patches = transformer.patch_embed
        patches.pos_embedding = patches._get_positional_embeddings(
            patches.sample_height, patches.sample_width, patches.sample_frames, device=device
        )
    add_adapter(transformer, Train(output_dir=Path("unused"), lora_rank=lora_rank, lora_alpha=lora_rank))
    for name, value in transformer.named_parameters():
        if "lora_B" in name:
            value.data.normal_(0, 0.02, generator=generator)
    return transformer.train()


def make_pack(
    conventions: Conventions, buckets: Sequence[Bucket], dtype: torch.dtype, device: torch.device
) -> list[ModelInput]:
    """Draw random clips; matrix products of zeros would run faster."""
    generator = torch.Generator(device).manual_seed(1)
    clips = []
    for bucket in buckets:
        _, frames, height, width = latent_shape(bucket)
        frames += padding_frames(frames, conventions.patch_size_t)
        latents = torch.randn(frames, conventions.in_channels, height, width, generator=generator, device=device)
        text = torch.randn(conventions.text_length, conventions.text_embed_dim, generator=generator, device=device)
        timestep = torch.randint(1000, (), generator=generator, device=device)
        clips.append(ModelInput(latents.to(dtype), text.to(dtype), timestep))
    return clips


def conventions_for(transformer_config: dict[str, Any]) -> Conventions:
    """Return the conventions of this transformer config with the published VAE and schedule."""
    vae = {
        "block_out_channels": [128, 256, 256, 512],
        "latent_channels": 16,
        "temporal_compression_ratio": 4,
        "scaling_factor": 0.7,
        "invert_scale_latents": False,
    }
    scheduler = {"prediction_type": "v_prediction", "snr_shift_scale": 1.0, "rescale_betas_zero_snr": True}
    return read_conventions(transformer_config, vae, scheduler)

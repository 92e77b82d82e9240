"""Configs at the sizes of the published checkpoints, and experiments with given [memory] fields."""

from typing import Any

import torch

from shared.config import Config, Train
from shared.model.conventions import Conventions, read_conventions
from shared.model.geometry import Bucket
from tests.tiny import scheduler_config, transformer_config, vae_config
from train.memory.simulation import Prediction, predict_peak
from train.transformer.engine import Plan

SMALL = Bucket(49, 480, 720)
LARGE = Bucket(81, 768, 1360)


def published(variant: str) -> dict[str, Any]:
    """Return a transformer config with the sizes of the real checkpoint."""
    config = transformer_config(variant, text_length=224 if variant.startswith("1.5") else 226)
    config |= {"attention_head_dim": 64, "time_embed_dim": 512, "text_embed_dim": 4096}
    heads, layers = (30, 30) if variant == "2b" else (48, 42)
    config |= {"num_attention_heads": heads, "num_layers": layers}
    if not variant.startswith("1.5"):
        config |= {"sample_height": 60, "sample_width": 90, "sample_frames": 49}
    return config


def published_conventions(variant: str) -> Conventions:
    """Return the conventions of a published checkpoint."""
    return read_conventions(published(variant), vae_config(variant), scheduler_config(variant))


def predicted(variant: str, plan: Plan, bucket: Bucket = SMALL, lora_rank: int = 64, **changes: Any) -> Prediction:
    """Return the simulated memory of one clip in bf16; `changes` go over the transformer's config."""
    config = published(variant) | changes
    conventions = read_conventions(config, vae_config(variant), scheduler_config(variant))
    train = Train.model_validate({"output_dir": "unused", "lora_rank": lora_rank, "lora_alpha": lora_rank})
    return predict_peak(config, conventions, train, plan, [bucket], torch.bfloat16)


def config_of(memory_fields: dict[str, Any], **train: Any) -> Config:
    """Return an experiment with these fields of [memory] and [train]."""
    return Config.model_validate(
        {
            "model": {"pretrained_model_name_or_path": "unused"},
            "data": {"name": "unused", "instance_data_root": "unused"},
            "precompute": {"cache": "unused"},
            "train": {"output_dir": "unused", "lora_rank": 4} | train,
            "memory": memory_fields,
        }
    )

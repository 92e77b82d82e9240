"""Memory plans to test, a config that asks for one, and the sizes of the published transformers."""

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest

from shared.config import Config
from tests.tiny import transformer_config
from train.transformer.engine import Plan

LEAN = Plan("attention_output", offload_activations=True, stream_weights=2, modulation_table=True, chunk_tokens=37)


PLANS = {
    "full": Plan("full"),
    "full-table": Plan("full", modulation_table=True),
    "full-chunks": Plan("full", chunk_tokens=29),
    "block_input": Plan("block_input"),
    "block_input-chunks": Plan("block_input", chunk_tokens=29),
    "attention_output": Plan("attention_output"),
    "attention_output-chunks": Plan("attention_output", chunk_tokens=29),
    "offload": replace(LEAN, stream_weights=0, modulation_table=False),
    "stream": replace(LEAN, offload_activations=False, modulation_table=False),
    "table": replace(LEAN, offload_activations=False, stream_weights=0),
    "lean": LEAN,
    "lean-block_input": replace(LEAN, activations="block_input"),
    "lean-full": replace(LEAN, activations="full"),
}


NF4 = pytest.param("nf4", marks=pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="no bitsandbytes"))


STORAGES = ("int8", "fp8", NF4)


def published(variant: str) -> dict[str, Any]:
    """Return a transformer config with the sizes of a published checkpoint."""
    config = transformer_config(variant, text_length=224 if variant.startswith("1.5") else 226)
    config |= {"attention_head_dim": 64, "time_embed_dim": 512, "text_embed_dim": 4096}
    config |= {"num_attention_heads": 30, "num_layers": 30} if variant == "2b" else {}
    config |= {"num_attention_heads": 48, "num_layers": 42} if variant != "2b" else {}
    if not variant.startswith("1.5"):
        config |= {"sample_height": 60, "sample_width": 90, "sample_frames": 49}
    return config


def config_of(memory_fields: dict[str, Any], **train: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"pretrained_model_name_or_path": "unused"},
            "data": {"name": "unused", "instance_data_root": "unused"},
            "precompute": {"cache": "unused"},
            "train": {"output_dir": "unused", "lora_rank": 4} | train,
            "memory": memory_fields,
        }
    )

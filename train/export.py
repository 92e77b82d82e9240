"""The adapter as diffusers loads it: one safetensors file that carries its own alpha."""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from shared.config import Train
from train.model import adapter_weights

FILE_NAME = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."
METADATA_KEY = "lora_adapter_metadata"
"""Header key under which diffusers looks for the adapter's settings (`diffusers/loaders/lora_base.py`)."""


def export_adapter(
    transformer: CogVideoXTransformer3DModel, train: Train, folder: Path, provenance: Mapping[str, str]
) -> Path:
    """Write the file and read it back through diffusers' own loader; the path. Weights are fp32.

    `load_lora_weights` applies lora_alpha / lora_rank by itself. Only the settings that every peft knows are stored,
    because diffusers hands them all to `LoraConfig`. `provenance` goes into the header beside them.
    """
    weights = {f"{PREFIX}{name}": tensor.detach().cpu() for name, tensor in adapter_weights(transformer).items()}
    settings = {
        f"{PREFIX}r": train.lora_rank,
        f"{PREFIX}lora_alpha": train.lora_alpha,
        f"{PREFIX}target_modules": list(train.lora_target_modules),
    }
    metadata = {"format": "pt", METADATA_KEY: json.dumps(settings, sort_keys=True), **provenance}
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".tmp-") as temporary:
        pending = Path(temporary) / FILE_NAME
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, pending, metadata)
        _check(pending, weights, settings)
        return pending.replace(folder / FILE_NAME)


def _check(path: Path, weights: Mapping[str, Tensor], settings: Mapping[str, object]) -> None:
    from diffusers.loaders.lora_pipeline import CogVideoXLoraLoaderMixin

    found, metadata = CogVideoXLoraLoaderMixin.lora_state_dict(str(path), return_lora_metadata=True)
    assert metadata == dict(settings), metadata
    assert found.keys() == weights.keys(), "names changed on the way to disk"
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items()), "bytes changed on the way to disk"

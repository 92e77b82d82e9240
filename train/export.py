"""The adapter as diffusers loads it: one safetensors file with its own alpha."""

import json
from collections.abc import Mapping
from pathlib import Path

from diffusers import CogVideoXTransformer3DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shared.atomic_files import replacing, sync_folder
from shared.config import Config, Train
from shared.errors import UsageError
from shared.fingerprint import Json, key_of
from shared.run_folder import ADAPTER, EXPORT, adapter_file
from train.checkpoint.files import sync_file
from train.transformer.load import adapter_weights

PREFIX = "transformer."
METADATA_KEY = "lora_adapter_metadata"
"""Header key of the adapter's settings in diffusers (`diffusers/loaders/lora_base.py`)."""
CONFIG_KEY, VIEW_KEY, BASE_KEY, STEPS_KEY = "precog_config", "precog_view", "precog_base", "precog_steps"
"""Header keys of `config_key`, the view's hash, `base_key` and the number of optimizer steps."""


def config_key(config: Config) -> str:
    """Return the key of what differs from the defaults, so that a field added later keeps the key."""
    return key_of({"config": config.model_dump(mode="json", exclude_defaults=True)})


def read_provenance(run: Path) -> dict[str, str]:
    """Read the header of a run folder's export; empty if there is none."""
    try:
        with safe_open(run / EXPORT / ADAPTER, framework="numpy") as tensors:
            return dict(tensors.metadata() or {})
    except (OSError, SafetensorError):
        return {}


def export_adapter(
    transformer: CogVideoXTransformer3DModel, train: Train, folder: Path, provenance: Mapping[str, str]
) -> Path:
    """Write the fp32 weights whole or not at all, and return the file's path.

    diffusers' `load_lora_weights` applies the scale itself, and DoRA's magnitudes under peft's names. Only settings
    that every peft version knows are stored, and rsLoRA and DoRA only when on, because diffusers passes them all to
    `LoraConfig`. `provenance` is added to the header.
    """
    weights = {f"{PREFIX}{name}": value.cpu().contiguous() for name, value in adapter_weights(transformer).items()}
    settings = json.dumps(adapter_settings(train), sort_keys=True)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / ADAPTER) as pending:
        save_file(weights, pending, {"format": "pt", METADATA_KEY: settings, **provenance})
        sync_file(pending)
    sync_folder(folder)
    return folder / ADAPTER


def adapter_settings(train: Train) -> dict[str, Json]:
    """Return the fields of `LoraConfig` that run the exported weights as they were trained."""
    settings: dict[str, Json] = {
        f"{PREFIX}r": train.lora_rank,
        f"{PREFIX}lora_alpha": train.lora_alpha,
        f"{PREFIX}target_modules": list(train.lora_target_modules),
    }
    for name in ("use_rslora", "use_dora"):
        if getattr(train, name):
            settings[f"{PREFIX}{name}"] = True
    return settings


def read_adapter(transformer: CogVideoXTransformer3DModel, train: Train, path: Path) -> dict[str, Tensor]:
    """Read the weights of an exported adapter under peft's names.

    Raises `UsageError` unless rank, alpha, target modules and shapes are those of this run.
    """
    where, fix = f"train.initial_adapter = {str(path)!r}", "set the fields that the adapter was trained with"
    try:
        with safe_open(adapter_file(path), framework="pt") as tensors:
            header = tensors.metadata() or {}
            weights = {name.removeprefix(PREFIX): tensors.get_tensor(name).float() for name in tensors.keys()}  # noqa: SIM118
        stored = json.loads(header.get(METADATA_KEY, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise UsageError(f"{where}: cannot be read ({error}); name the export folder of a run") from None
    for name, value in adapter_settings(train).items():
        found = stored.get(name)
        same = sorted(found) == sorted(train.lora_target_modules) if isinstance(found, list) else found == value
        if not same:
            raise UsageError(f"{where}: expected {name.removeprefix(PREFIX)} {value!r}, got {found!r}; {fix}")
    expected, got = (
        {name: (*value.shape,) for name, value in of.items()} for of in (adapter_weights(transformer), weights)
    )
    for name in sorted(expected.keys() | got.keys()):
        if expected.get(name) != got.get(name):
            raise UsageError(f"{where}: expected {name} of shape {expected.get(name)}, got {got.get(name)}; {fix}")
    return weights

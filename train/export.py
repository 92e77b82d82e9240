"""The adapter as diffusers loads it: one safetensors file with its own alpha."""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shared.atomic_files import sync_folder
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
    """Write the fp32 weights, read them back through diffusers' loader, and return the file's path.

    `load_lora_weights` applies the scale itself, and DoRA's magnitudes under peft's names. Only settings that every
    peft version knows are stored, and rsLoRA and DoRA only when on, because diffusers passes them all to `LoraConfig`.
    `provenance` is added to the header.
    """
    weights = {f"{PREFIX}{name}": tensor.detach().cpu() for name, tensor in adapter_weights(transformer).items()}
    settings = adapter_settings(train)
    metadata = {"format": "pt", METADATA_KEY: json.dumps(settings, sort_keys=True), **provenance}
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".tmp-") as temporary:
        pending = Path(temporary) / ADAPTER
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, pending, metadata)
        _check(pending, weights, settings)
        sync_file(pending)
        written = pending.replace(folder / ADAPTER)
    sync_folder(folder)
    return written


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
    own = adapter_weights(transformer)
    wrong = sorted(name for name in own.keys() | weights.keys() if _shape(own, name) != _shape(weights, name))
    if wrong:
        here, there = _shape(own, wrong[0]), _shape(weights, wrong[0])
        raise UsageError(f"{where}: expected {wrong[0]} of shape {here}, got {there}; {fix}")
    return weights


def _shape(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(weights[name].shape) if name in weights else None


def _check(path: Path, weights: Mapping[str, Tensor], settings: Mapping[str, object]) -> None:
    from diffusers.loaders.lora_pipeline import CogVideoXLoraLoaderMixin

    found, metadata = CogVideoXLoraLoaderMixin.lora_state_dict(str(path), return_lora_metadata=True)
    assert metadata == dict(settings), metadata
    assert found.keys() == weights.keys(), "names changed on the way to disk"
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items()), "bytes changed on the way to disk"

"""The adapter as diffusers loads it: one safetensors file with its own alpha."""

from collections.abc import Mapping
from pathlib import Path

from diffusers import CogVideoXTransformer3DModel
from torch import Tensor

from shared.atomic_files import make_folder, replacing
from shared.config import Config, Train
from shared.errors import UsageError
from shared.fingerprint import Json, key_of
from shared.model.adapters import PREFIX, diffusers_settings, pack_lora, read_lora
from shared.run_folder import ADAPTER, adapter_file
from train.transformer.load import adapter_weights


def config_key(config: Config) -> str:
    """Return the key of what differs from the defaults, so that a field added later keeps the key."""
    return key_of({"config": config.model_dump(mode="json", exclude_defaults=True)})


def export_adapter(
    transformer: CogVideoXTransformer3DModel, train: Train, folder: Path, provenance: Mapping[str, str]
) -> Path:
    """Write the fp32 weights whole or not at all, and return the file's path.

    diffusers' `load_lora_weights` applies the scale itself, and DoRA's magnitudes under peft's names. Only settings
    that every peft version knows are stored, and rsLoRA and DoRA only when on, because diffusers passes them all to
    `LoraConfig`. `provenance` is added to the header.
    """
    weights = {f"{PREFIX}{name}": value for name, value in adapter_weights(transformer).items()}
    make_folder(folder)
    with replacing(folder / ADAPTER) as pending:
        pending.write_bytes(pack_lora(weights, {**adapter_header(train), **provenance}))
    return folder / ADAPTER


def adapter_header(train: Train) -> dict[str, str]:
    """Return the header with the fields of `LoraConfig` that run the weights as they are trained."""
    settings: dict[str, Json] = {
        "r": train.lora_rank,
        "lora_alpha": train.lora_alpha,
        "target_modules": list(train.lora_target_modules),
    }
    return diffusers_settings(settings | {name: True for name in ("use_rslora", "use_dora") if getattr(train, name)})


def read_adapter(transformer: CogVideoXTransformer3DModel, train: Train, path: Path) -> dict[str, Tensor]:
    """Read the weights of any LoRA file of this model under peft's names.

    Raises `UsageError` unless rank, alpha, target modules and shapes are those of this run, and `DataError` for a
    damaged export. A file without alpha is taken with this run's, and a warning.
    """
    where, fix = f"train.initial_adapter = {str(path)!r}", "set the fields that the adapter was trained with"
    expected = {name: (*value.shape,) for name, value in adapter_weights(transformer).items()}
    modules = (name for name, layer in transformer.named_modules() if hasattr(layer, "in_features"))
    found = read_lora(adapter_file(path), modules, "train.initial_adapter", train.lora_alpha)
    pairs: dict[str, tuple[float, float]] = {
        "lora_rank": (train.lora_rank, found.rank),
        "lora_alpha": (train.lora_alpha, found.alpha),
        "use_rslora": (train.use_rslora, found.use_rslora),
        "use_dora": (train.use_dora, found.use_dora),
    }
    for name, (wanted, got) in pairs.items():
        if wanted != got:
            raise UsageError(f"{where}: expected {name} {wanted}, got {got}; set train.{name}={str(got).lower()}")
    shapes = {name: (*value.shape,) for name, value in found.weights.items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise UsageError(f"{where}: expected {name} of shape {expected.get(name)}, got {shapes.get(name)}; {fix}")
    return found.weights

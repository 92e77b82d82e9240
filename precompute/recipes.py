"""Recipes of latents and prompts, the keys that follow from them, and the record of who encoded.

Everything that changes a stored byte is in a recipe or a key. Names, paths, times, batch and worker counts are not.
"""

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from precompute import pixels
from precompute.encoders import vae_precision
from precompute.windows import Window
from shared.cache.collection import FORMAT, Collection
from shared.cache.storage import Storage
from shared.config import Config
from shared.errors import UsageError
from shared.fingerprint import Json, key_of, sha256_files
from shared.model.conventions import Conventions, read_conventions
from shared.model.geometry import ENCODE_CHUNK_FRAMES
from shared.model.pretrained import Component, pretrained_config, pretrained_folder, pretrained_part

TOKENIZER_FILES = (
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers", "sentencepiece", "numpy", "av", "decord")


@dataclass(frozen=True, slots=True)
class Encoders:
    """The parts of the checkpoint that stage 1 encodes with: on disk, not loaded yet."""

    vae: Component
    text_encoder: Component
    tokenizer: Path
    conventions: Conventions


def find_encoders(config: Config) -> Encoders:
    """Find the parts and read the conventions; raises `UsageError` naming what is missing."""
    vae = pretrained_part(config.model, "vae")
    transformer = pretrained_config(config.model, "transformer")
    scheduler = pretrained_config(config.model, "scheduler")
    conventions = read_conventions(transformer, vae.config, scheduler)
    tokenizer = pretrained_folder(config.model, "tokenizer")
    if not any((tokenizer / name).is_file() for name in TOKENIZER_FILES[:2]):
        found = f"{TOKENIZER_FILES[0]} and {TOKENIZER_FILES[1]} not found"
        raise UsageError(f"{tokenizer}: {found}; download the checkpoint again")
    return Encoders(vae, pretrained_part(config.model, "text_encoder"), tokenizer, conventions)


def latents_recipe(config: Config, encoders: Encoders) -> dict[str, Json]:
    """Return everything but the clip itself that shapes its moments."""
    settings = config.precompute
    image = encoders.conventions.image_to_video
    precision = vae_precision(settings.vae_dtype, encoders.vae)
    return {
        "format": FORMAT,
        "kind": "latents",
        "transform": pixels.TRANSFORM,
        "vae": {"weights": encoders.vae.sha256(), "config": encoders.vae.settings},
        "precision": precision,
        "tf32": precision == "tf32",
        "chunk_frames": ENCODE_CHUNK_FRAMES,
        "tiling": settings.enable_tiling,
        "slicing": settings.enable_slicing,
        "channels_last": settings.channels_last,
        "compiled": settings.compile_vae,
        "image_conditions": {"noised": settings.noised_image_count, "log_sigma": [-3.0, 0.5]} if image else None,
    }


def prompts_recipe(config: Config, encoders: Encoders) -> dict[str, Json]:
    """Return everything but the text itself that shapes its embedding."""
    part = encoders.text_encoder
    tokenizer = [encoders.tokenizer / name for name in TOKENIZER_FILES if (encoders.tokenizer / name).is_file()]
    return {
        "format": FORMAT,
        "kind": "prompts",
        "text_encoder": {"weights": part.sha256(), "config": part.settings},
        "tokenizer": dict(sha256_files(tokenizer)),
        "text_length": encoders.conventions.text_length,
        "precision": part.precision(config.precompute.text_dtype),
        "attention_mask": False,
    }


def latent_key(source_sha256: str, window: Window, mode: str, recipe: str) -> str:
    """Return the key of one window's moments."""
    return key_of(
        {
            "source": source_sha256,
            "timestamps_us": list(window.timestamps_us),
            "indices": list(window.indices),
            "bucket": str(window.bucket),
            "crop": mode,
            "flip": window.flip,
            "recipe": recipe,
        }
    )


def crop_seed(source_sha256: str, timestamps_us: Sequence[int]) -> str:
    """Return the seed of a random crop: the clip's bytes and times, independent of the recipe."""
    return key_of([source_sha256, list(timestamps_us)])


def prompt_key(text: str, recipe: str) -> str:
    """Return the key of one text's embedding."""
    return key_of({"text": text, "recipe": recipe})


def environment(device: torch.device) -> dict[str, Json]:
    """Return the library versions and the device, which may change the rounding of a recipe."""
    versions: dict[str, Json] = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            versions[library] = None
    facts: dict[str, Json] = {"name": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"}
    if device.type == "cuda":
        facts = {
            "name": torch.cuda.get_device_name(device),
            "capability": list(torch.cuda.get_device_capability(device)),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    return {"versions": versions, "device": facts}


def record_environment(storage: Storage, collection: Collection, device: torch.device) -> None:
    """Write `made_by/<recipe>/<hash>.json` before the first shard; it is in no key. Raises as `Storage.publish`."""
    found = environment(device)
    name = f"made_by/{collection.recipe}/{key_of(found)}.json"
    storage.publish(name, json.dumps(found, indent=1, sort_keys=True).encode())

"""With which library versions and devices a collection was made: on record, and in no key.

Recipe, shards and receipts have to be the same bytes whoever makes them, so this stands in none of them. Each
environment that encodes for a recipe is one file, `made_by/<recipe>/<hash>.json`, named by its content: any number of
workers write it once.
"""

import json
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from shared.cache.collection import Collection
from shared.cache.storage import Storage
from shared.fingerprint import Json, key_of

LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers", "sentencepiece", "numpy", "av", "decord")


def environment(device: torch.device) -> dict[str, Json]:
    """Everything beside the recipe that may change the rounding of what is encoded on `device` here."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
        "device": _device(device),
    }


def record(storage: Storage, collection: Collection, device: torch.device) -> None:
    """Note this environment beside the collection, before its first shard; raises as `Storage.publish`."""
    found = environment(device)
    name = f"made_by/{collection.recipe}/{key_of(found)}.json"
    storage.publish(name, json.dumps(found, indent=1, sort_keys=True).encode())


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _device(device: torch.device) -> dict[str, Json]:
    if device.type != "cuda":
        return {"name": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"}
    return {
        "name": torch.cuda.get_device_name(device),
        "capability": list(torch.cuda.get_device_capability(device)),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }

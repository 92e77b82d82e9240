"""Record of the library versions and devices that made a collection. It is in no key.

Recipe, shards and receipts must be the same bytes on every machine, so they do not hold it. Each environment that
encodes for a recipe is one file, `made_by/<recipe>/<hash>.json`, named by its content and written once.
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
    """Return what may change the rounding on `device`, apart from the recipe."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
        "device": _device(device),
    }


def record(storage: Storage, collection: Collection, device: torch.device) -> None:
    """Write this environment before the first shard; raises as `Storage.publish`."""
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
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call, unused-ignore]
    }

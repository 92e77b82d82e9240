"""Small checkpoints with known content, and damage to a stored sample, for tests of files, resume and training."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.cache.collection import shards
from shared.cache.storage import open_storage
from shared.cache.view import ViewRow, read_view
from shared.config import Config
from tests.experiments import changed
from train.checkpoint.files import COMMIT, STATE, Checkpoint, save_checkpoint

FILES = [COMMIT, STATE, "adapter.safetensors", "optimizer.safetensors"]
Group = dict[str, dict[str, Tensor]]


def content(step: int, variant: int = 0) -> tuple[Group, dict[str, Any]]:
    """Return tensors and state that depend on step and variant, with numbers that are hard to store."""
    generator = torch.Generator().manual_seed(1000 * variant + step)
    groups = {
        "adapter": {f"block.{index}.lora_A": torch.randn(3, 5, generator=generator) for index in range(4)},
        "optimizer": {"exp_avg": torch.randn(7, generator=generator), "step": torch.tensor(float(step))},
    }
    state = {"losses": [0.1 + 0.2, 5e-324, -0.0, 1e300], "position": 2**53 + step, "view": "æ—✓", "none": None}
    return groups, state | {"identity": {}, "base": {"sha256": "", "marks": []}}


def save(run: Path, step: int, variant: int = 0) -> Path:
    """Save that content."""
    return save_checkpoint(run, step, *content(step, variant))


def is_content(found: Checkpoint | None, step: int, variant: int = 0) -> bool:
    """Compare a checkpoint with that content, bit for bit."""
    groups, state = content(step, variant)
    return found is not None and found.step == step and found.state == state and same_bits(found.tensors, groups)


def same_bits(left: Mapping[str, Mapping[str, Tensor]], right: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Compare dtypes, shapes and bytes, so that NaN equals NaN and -0 differs from 0."""

    def raw(groups: Mapping[str, Mapping[str, Tensor]]) -> Any:
        return {
            (file, name): (tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).tolist())
            for file, group in groups.items()
            for name, tensor in group.items()
        }

    return bool(raw(left) == raw(right))


def silence(line: str) -> None:
    """Fail on any report."""
    raise AssertionError(f"reported: {line}")


def names(run: Path) -> list[str]:
    """Return the names in a run folder except temporary ones."""
    return sorted(path.name for path in run.iterdir() if not path.name.startswith(".tmp-"))


def damaged(config: Config, folder: Path, split: str, number: int) -> tuple[Config, ViewRow, str]:
    """Copy the cache into `folder` and flip a bit in the latents of a clip; return config, clip and tar."""
    cache = folder / "cache"
    shutil.copytree(config.precompute.cache, cache)
    config = changed(config, precompute={"cache": str(cache)})
    storage = open_storage(str(cache), local_cache_gib=1)
    row = read_view(storage, config.data.name).split(split)[number]
    places = [(tar, place) for tar, receipt in shards(storage, "latents") for place in receipt.samples]
    tar, place = next((tar, place) for tar, place in places if place.key == row.latent_key)
    content = bytearray((cache / tar).read_bytes())
    content[place.offset + place.length // 2] ^= 4
    (cache / tar).write_bytes(content)
    return config, row, f"{cache}/{tar}"

"""Training from a cache behind a URL with room for a few shards: the same run, and no silent change of its order."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shared.cache.collection import shards
from shared.cache.storage import open_storage
from shared.config import Config
from shared.errors import CacheError
from shared.run_folder import read_metrics
from shared.signals import StopSignal
from tests import corpus
from train.loop import train

NUM_CLIPS, URL = 24, "memory://training/cache"
SETTINGS = {
    "lora_rank": 4,
    "learning_rate": 1e-2,
    "global_batch_size": 2,
    "max_tokens_per_pack": 200,
    "max_train_steps": NUM_CLIPS // 2,
    "checkpointing_steps": 4,
    "log_clips": True,
    "device": "cpu",
}


@pytest.fixture
def local(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    """Fill a cache of seven shards in a folder, and copy it behind the URL."""
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "copies"))
    root, settings = corpus.write_corpus(tmp_path / "clips", NUM_CLIPS + 1), {"held_out_clips": 1}
    config = corpus.config_for(
        pipeline, root, tmp_path / "cache", data=settings, clips_per_shard=4, prompts_per_shard=4
    )
    corpus.run(config)
    MemoryFileSystem().put(config.precompute.cache, "/training/cache", recursive=True)
    yield config
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def changed(local: Config, folder: Path, cache: str, num_shards: float, **values: Any) -> Config:
    """Room for copies of `num_shards` shards of latents."""
    sizes = [receipt.size for _, receipt in shards(open_storage(local.precompute.cache), "latents")]
    room = {"cache": cache, "local_cache_gib": num_shards * max(sizes) / 2**30}
    return local.model_copy(
        update={
            "precompute": local.precompute.model_copy(update=room),
            "train": local.train.model_validate(SETTINGS | {"output_dir": folder} | values),
        }
    )


def clips_of(config: Config) -> list[str]:
    return [key for line in read_metrics(config.train.output_dir) for key in line["clips"]]


def weights_of(config: Config) -> dict[str, torch.Tensor]:
    return load_file(config.train.output_dir / "export" / "pytorch_lora_weights.safetensors")


def test_a_window_of_shards_is_the_same_run_anywhere_and_never_changes(local: Config, tmp_path: Path) -> None:
    folder, straight = local.precompute.cache, changed(local, tmp_path / "straight", URL, 5)
    whole = changed(local, tmp_path / "whole", folder, 5, max_train_steps=2)
    parts = changed(local, tmp_path / "parts", URL, 5, max_train_steps=4)
    for config in (straight, whole, parts):
        train(config, StopSignal())
    assert len(set(clips_of(straight))) == NUM_CLIPS and clips_of(whole) != clips_of(straight)[:4]
    for num_shards in (2, 1000):
        with pytest.raises(CacheError, match=r"train\.shuffle_shards was '3 of layout \w+', is '(1 of|all)"):
            train(changed(local, tmp_path / "parts", URL, num_shards), StopSignal())
    # Named in the config, the order stays whatever the room: on a larger disk, or from a copy of the cache.
    train(changed(local, tmp_path / "parts", URL, 1000, shuffle_shards=3, max_train_steps=8), StopSignal())
    train(changed(local, tmp_path / "parts", folder, 1, shuffle_shards=3), StopSignal())
    assert clips_of(parts) == clips_of(straight)
    assert all(torch.equal(tensor, weights_of(parts)[name]) for name, tensor in weights_of(straight).items())

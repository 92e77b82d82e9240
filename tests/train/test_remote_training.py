"""Training from a cache behind S3 with a local cache of two shards: few downloads, the same run, no silent change."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shared.cache.collection import shards
from shared.cache.storage import open_storage
from shared.cache.view import read_view
from shared.config import Config
from shared.errors import CacheError
from shared.run_folder import read_metrics
from shared.signals import StopSignal
from tests import corpus, tiny
from train.loop import train

NUM_CLIPS, PER_SHARD = 24, 4
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


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Fill a cache in a folder: clips to train on in seven shards, and one held out."""
    folder = tmp_path_factory.mktemp("remote")
    config = corpus.config_for(
        tiny.save_pipeline("2b", folder / "tiny"),
        corpus.write_corpus(folder / "clips", NUM_CLIPS + 1),
        folder / "cache",
        data={"held_out_clips": 1},
        clips_per_shard=PER_SHARD,
        prompts_per_shard=PER_SHARD,
    )
    corpus.run(config)
    return config


@pytest.fixture(scope="module")
def url(local: Config, server: int) -> Iterator[str]:
    """Upload the same cache into a bucket."""
    import s3fs

    with pytest.MonkeyPatch.context() as environment:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server}",
        }.items():
            environment.setenv(name, value)
        filesystem = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
        filesystem.mkdir("training")
        filesystem.put(local.precompute.cache, "training/cache", recursive=True)
        yield "s3://training/cache"


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep copies of shards below the test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "copies"))


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each tar was fetched whole."""
    import s3fs

    counts: Counter[str] = Counter()
    fetch = s3fs.S3FileSystem._get_file

    async def counted(self: Any, name: str, *arguments: Any, **options: Any) -> Any:
        counts[name.partition("/cache/")[2]] += 1
        return await fetch(self, name, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_get_file", counted)
    yield counts


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


def test_an_epoch_fetches_each_shard_once_and_not_one_per_clip(
    local: Config, url: str, tmp_path: Path, downloads: Counter[str]
) -> None:
    windowed = changed(local, tmp_path / "windowed", url, 2)
    train(windowed, StopSignal())
    fetched = dict(downloads)
    keys = {row.latent_key for row in read_view(open_storage(local.precompute.cache), "corpus").split("train")}
    assert sorted(clips_of(windowed)) == sorted(keys)
    tars = [tar for tar, receipt in shards(open_storage(local.precompute.cache), "latents") if receipt.samples]
    holding = {tar for tar in tars if tar in fetched}
    assert len(holding) >= NUM_CLIPS // PER_SHARD
    assert fetched == dict.fromkeys(holding, 1), "latents once; prompts and the held-out clip are read alone"

    downloads.clear()
    train(changed(local, tmp_path / "whole", url, 2, shuffle_shards="all"), StopSignal())
    assert downloads.total() > 1.5 * len(holding)


def test_a_folder_with_the_same_window_makes_the_same_run(local: Config, url: str, tmp_path: Path) -> None:
    remote = changed(local, tmp_path / "remote", url, 5)
    folder = changed(local, tmp_path / "folder", local.precompute.cache, 5, shuffle_shards=3)
    whole = changed(local, tmp_path / "whole", local.precompute.cache, 5)
    for config in (remote, folder, whole):
        train(config, StopSignal())
    assert clips_of(remote) == clips_of(folder) != clips_of(whole)
    assert all(torch.equal(tensor, weights_of(folder)[name]) for name, tensor in weights_of(remote).items())


def test_a_resumed_run_does_not_change_its_order(local: Config, url: str, tmp_path: Path) -> None:
    straight = changed(local, tmp_path / "straight", url, 5)
    train(straight, StopSignal())
    parts = changed(local, tmp_path / "parts", url, 5, max_train_steps=4)
    train(parts, StopSignal())
    for num_shards in (2, 1000):
        with pytest.raises(CacheError, match=r"train\.shuffle_shards was '3 of layout \w+', is '(1 of|all)"):
            train(changed(local, tmp_path / "parts", url, num_shards), StopSignal())
    # Named in the config, the order stays whatever the room: on a larger disk, or from a copy of the cache.
    train(changed(local, tmp_path / "parts", url, 1000, shuffle_shards=3, max_train_steps=8), StopSignal())
    train(changed(local, tmp_path / "parts", local.precompute.cache, 1, shuffle_shards=3), StopSignal())
    assert clips_of(parts) == clips_of(straight)
    assert all(torch.equal(tensor, weights_of(parts)[name]) for name, tensor in weights_of(straight).items())

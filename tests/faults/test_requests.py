"""How many requests a cache of 200 shards on S3 costs each command."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from precog import app
from shared.cache.collection import shards
from shared.cache.remote import KNOWN
from shared.cache.storage import open_storage
from shared.config_file import save_config
from tests import corpus

CLIPS = 98


@pytest.mark.faults
def test_a_command_sends_at_most_1_3_requests_per_shard(
    pipeline: Path, server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    environment = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "local"))
    filesystem = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    filesystem.mkdir("requests")
    url, root = "s3://requests/cache", corpus.write_corpus(tmp_path / "clips", CLIPS)
    settings: dict[str, Any] = {"clips_per_shard": 1, "prompts_per_shard": 1, "data": {"held_out_clips": 1}}
    corpus.run(corpus.config_for(pipeline, root, url, **settings))
    config = corpus.config_for(pipeline, root, url, **settings)
    train = {"lora_rank": 4, "max_train_steps": 2, "device": "cpu", "output_dir": tmp_path / "run"}
    save_config(config.model_copy(update={"train": config.train.model_validate(train)}), tmp_path / "config.toml")
    num_shards = sum(len(shards(open_storage(url), kind)) for kind in ("latents", "prompts"))
    assert num_shards >= 2 * CLIPS
    requests: Counter[str] = Counter()
    call = s3fs.S3FileSystem._call_s3

    async def counted(driver: Any, method: str, *arguments: Any, **options: Any) -> Any:
        requests[method] += 1
        return await call(driver, method, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)
    for count, command in enumerate(("precompute", "plan", "precompute", "train")):
        requests.clear()
        KNOWN.clear()
        done = CliRunner().invoke(app, [command, str(tmp_path / "config.toml")])
        assert done.exit_code == 0, done.stderr
        assert count == 0 or requests.total() <= 1.3 * num_shards  # the first one reads every clip for its data page

"""`precog train --dry-run` measures a healthy experiment, and refuses one with a planted fault as a run would."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import precog
from shared.config import Config
from shared.config_file import save_config
from shared.signals import StopSignal
from tests.experiments import changed, fill_cache, write_experiment
from tests.tiny import build_transformer
from train.loop import train

Plant = Callable[[Path], list[str] | None]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    fill_cache(write_experiment("5b", folder))
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """Copy the precomputed experiment, to break it."""
    shutil.copytree(original, tmp_path / "5b")
    return tmp_path / "5b"


def config_in(folder: Path, **train: Any) -> Config:
    return write_experiment("5b", folder, max_train_steps=4, lora_rank=4, **train)


def dry_run(folder: Path, *options: str) -> Result:
    save_config(config_in(folder), folder / "experiment.toml")
    return CliRunner().invoke(precog.app, ["train", str(folder / "experiment.toml"), "--dry-run", *options])


def test_a_healthy_run_is_measured_and_nothing_is_written(folder: Path) -> None:
    result = dry_run(folder, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["device"], found["resumes_at_step"], found["num_steps"]) == ("cpu", 0, 4)
    for batch in (found["largest"], found["typical"]):
        assert batch["seconds"] > 0 and batch["peak_memory_bytes"] > 2**20
        assert 0 < batch["largest_pack_tokens"] <= batch["tokens"]
    assert found["hours"] >= 4 * found["typical"]["seconds"] / 3600
    assert "s a step" in result.stderr and "Dry run: nothing is refused" in result.stderr
    assert not (folder / "run").exists()


def test_a_begun_run_stays_as_it_is(folder: Path) -> None:
    config = config_in(folder)
    train(changed(config, train={"max_train_steps": 2}), StopSignal())

    def content() -> dict[Path, tuple[int, bytes]]:
        paths = [path for path in (folder / "run").rglob("*") if path.is_file()]
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}

    before = content()
    assert json.loads(dry_run(folder, "--json").stdout)["resumes_at_step"] == 2
    assert content() == before
    assert dry_run(folder, "train.seed=7").exit_code == 4, "another run"


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes), "utf-8")


def only_shard(folder: Path, kind: str) -> Path:
    (shard,) = (folder / "cache" / kind).rglob("*.tar")
    return shard


def other_scaling_factor(folder: Path) -> None:
    edit(folder / "model/vae/config.json", scaling_factor=1.15258426)


def prompt_without_embedding(folder: Path) -> list[str]:
    return ['data.validation_prompts=["a dog"]', "train.preview_steps=2"]


def image_transformer(folder: Path) -> None:
    build_transformer("5b-i2v").save_pretrained(folder / "model/transformer")


def smaller_grid(folder: Path) -> None:
    edit(folder / "model/transformer/config.json", sample_height=2, patch_size_t=2)


def torn_transformer(folder: Path) -> None:
    weights = folder / "model/transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def truncated_shard(folder: Path) -> None:
    shard = only_shard(folder, "latents")
    shard.write_bytes(shard.read_bytes()[:-512])


def lost_receipt(folder: Path) -> None:
    for receipt in (folder / "cache/latents").rglob("9x64x96/*.json"):
        receipt.unlink()


def flipped_bit(folder: Path) -> None:
    shard = only_shard(folder, "latents")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


FAULTS: list[tuple[Plant, int, str]] = [
    (other_scaling_factor, 4, r"VAE .*scaling_factor"),
    (prompt_without_embedding, 4, "a dog"),
    (image_transformer, 4, "made for text-to-video"),
    (smaller_grid, 2, "the position grid of this checkpoint ends at 16x"),
    (torn_transformer, 2, r"diffusion_pytorch_model\.safetensors"),
    (truncated_shard, 4, r"\.tar: "),
    (lost_receipt, 4, "sample [0-9a-f]{32}"),
    (flipped_bit, 4, "sample [0-9a-f]{32}.*damaged"),
]


@pytest.mark.parametrize(("plant", "code", "line"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_planted_fault_is_refused_in_one_line(plant: Plant, code: int, line: str, folder: Path) -> None:
    result = dry_run(folder, *(plant(folder) or []))
    last = result.stderr.splitlines()[-1]
    assert result.exit_code == code, result.output
    assert last.startswith("precog: ") and re.search(line, last), last
    assert not (folder / "run").exists()

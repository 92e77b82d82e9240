"""The checkpoint that a run resumes: as asked for, one for all processes, and of this very run."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline

from shared.cache.storage import LocalStorage
from shared.cache.view import read_view, write_view
from shared.config import Config
from shared.errors import CacheError, UsageError
from shared.fingerprint import sha256_files
from shared.model import pretrained
from shared.run_folder import read_metrics
from shared.signals import StopSignal
from tests import tiny
from tests.experiments import changed
from tests.train import processes
from tests.train.saved import is_content, save
from train.checkpoint.resume import find_checkpoint, is_finished, refuse_another_run
from train.loop import train

Settings = Callable[..., Config]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_a_name_is_that_checkpoint_if_it_is_the_newest(run: Path) -> None:
    save(run, 10)
    newer = save(run, 20)
    for request in ("latest", "checkpoint-000020", "checkpoint-000020/"):
        assert is_content(find_checkpoint(run, request), 20)
    line = r"has newer checkpoints; move checkpoint-000020 to another folder, or set \"latest\"$"
    with pytest.raises(UsageError, match=line):
        find_checkpoint(run, "checkpoint-000010")
    newer.rename(run / "aside")
    assert is_content(find_checkpoint(run, "checkpoint-000010"), 10)


@pytest.mark.parametrize("request_", ["checkpoint-000030", "../run/checkpoint-000010"])
def test_an_unknown_name_is_refused_with_the_known_ones(run: Path, request_: str) -> None:
    save(run, 10)
    save(run, 20)
    with pytest.raises(UsageError, match=r"there are checkpoint-000010, checkpoint-000020$"):
        find_checkpoint(run, request_)
    with pytest.raises(UsageError, match=r"there are none$"):
        find_checkpoint(run / "empty", request_)


def test_none_refuses_a_run_that_has_checkpoints(run: Path) -> None:
    assert find_checkpoint(run, "none") is None and find_checkpoint(run, "latest") is None
    save(run, 10)
    with pytest.raises(UsageError, match=r"has checkpoint-000010; choose another train\.output_dir"):
        find_checkpoint(run, "none")


def test_a_run_is_finished_only_with_this_config_view_and_base_model(settings: Settings, tmp_path: Path) -> None:
    config = settings(max_train_steps=1)
    model, cache = tmp_path / "model", tmp_path / "cache"
    shutil.copytree(config.model.pretrained_model_name_or_path, model)
    shutil.copytree(config.precompute.cache, cache)
    places = {"model": {"pretrained_model_name_or_path": str(model)}, "precompute": {"cache": str(cache)}}
    config = changed(config, **places)
    assert not is_finished(config)
    train(config, StopSignal())
    files = [path for path in config.train.output_dir.rglob("*") if path.is_file()]
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}
    train(config, StopSignal())
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files} == before, "it ends at once"
    assert is_finished(config) and not is_finished(changed(config, train={"max_train_steps": 2}))
    storage = LocalStorage(str(cache))
    view = read_view(storage, config.data.name)
    write_view(storage, replace(view, rows=view.rows[1:]))
    assert not is_finished(config)
    write_view(storage, view)
    assert is_finished(config)
    checkpoint = config.train.output_dir / "checkpoint-000001"
    earlier = checkpoint.rename(checkpoint.with_name("checkpoint-000000"))  # as if sent back to it
    assert not is_finished(config)
    earlier.rename(checkpoint)
    other_weights(model)
    assert not is_finished(config)

    pipeline = CogVideoXPipeline.from_pretrained(config.model.pretrained_model_name_or_path)
    weights = []
    for place in ("checkpoint-000001/adapter.safetensors", "export"):
        pipeline.load_lora_weights(str(config.train.output_dir / place), adapter_name="lora")
        layer = pipeline.transformer.transformer_blocks[0].attn1.to_q
        assert layer.scaling["lora"] == 8 / 4, "a checkpoint, too, has its alpha for diffusers"
        weights.append(layer.lora_B["lora"].weight)
        pipeline.unload_lora_weights()
    assert torch.equal(*weights) and weights[0].any()


# One checkpoint for all processes


def train_apart(here: Config, there: Config) -> list[int | None]:
    return processes.finish(processes.start(here, 2, configs={1: there}), others_follow=False)


def test_ranks_without_the_checkpoint_get_it_from_rank_0(settings: Settings) -> None:
    """Rank 0 falls back from a damaged checkpoint; rank 1 is on a machine without the run folder."""
    first = settings(max_train_steps=4, checkpointing_steps=2)
    train(first, StopSignal())
    folder = first.train.output_dir
    (folder / "checkpoint-000004" / "optimizer.safetensors").write_bytes(b"")
    values = {"max_train_steps": 6, "checkpointing_steps": 2}
    here, there = settings(**values), settings("other", **values)
    assert train_apart(here, there) == [0, 0], processes.log(there, 1)
    assert f"resuming from {folder}/checkpoint-000002 at step 2 of 6" in processes.log(here)
    assert [line["step"] for line in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert not there.train.output_dir.exists()


def test_ranks_of_different_runs_are_refused(settings: Settings) -> None:
    here, there = settings(), settings(seed=1)
    assert train_apart(here, there) == [4, 4]
    for rank in range(2):
        last = processes.log(here, rank).splitlines()[-1]
        assert last.startswith("precog: rank 1: another run than rank 0's (train.seed is 1, 42 on rank 0)")
    assert not (here.train.output_dir / "metrics.jsonl").exists()


# The same run


def other_weights(model: Path) -> None:
    tiny.build_transformer("2b", seed=1).save_pretrained(model / "transformer")


def other_config(model: Path) -> None:
    file = model / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"norm_eps": 1e-4}), "utf-8")


def begun_in(folder: Path, experiment: Config, max_train_steps: int) -> Config:
    """Return a run on its own copy of the model, from an adapter that was exported before."""
    values = {"output_dir": folder / "run", "initial_adapter": folder / "adapter", "max_train_steps": max_train_steps}
    return changed(experiment, train=values, model={"pretrained_model_name_or_path": str(folder / "model")})


@pytest.fixture(scope="module")
def two_steps(experiment: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of such a run after two steps."""
    folder = tmp_path_factory.mktemp("two_steps")
    shutil.copytree(experiment.model.pretrained_model_name_or_path, folder / "model")
    train(changed(experiment, train={"output_dir": folder / "first", "max_train_steps": 1}), StopSignal())
    (folder / "first" / "export").rename(folder / "adapter")
    train(begun_in(folder, experiment, 2), StopSignal())
    return folder


@pytest.fixture
def begun(two_steps: Path, experiment: Config, tmp_path: Path) -> Config:
    """Return a copy of that run with four steps."""
    shutil.copytree(two_steps, tmp_path / "begun")
    return begun_in(tmp_path / "begun", experiment, 4)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (other_weights, r"transformer\.weights was '[0-9a-f]{32}', is '[0-9a-f]{32}'"),
        (other_config, r"transformer\.config\.norm_eps was 1e-05, is 0\.0001"),
    ],
)
def test_another_base_model_is_another_run(change: Callable[[Path], None], line: str, begun: Config) -> None:
    change(Path(begun.model.pretrained_model_name_or_path))
    with pytest.raises(CacheError, match=rf"checkpoint-000002: made by another run \({line}\); choose another"):
        train(begun, StopSignal())


@pytest.mark.parametrize(
    ("table", "values", "line"),
    [
        ("train", {"mixed_precision": "bf16"}, "train.mixed_precision was 'float32', is 'bfloat16'"),
        ("train", {"adam_beta1": 0.5}, "train.adam_beta1 was 0.9, is 0.5"),
        ("memory", {"base_precision": "int8"}, "memory.base_precision was 'model', is 'int8'"),
    ],
)
def test_another_setting_is_another_run(table: str, values: dict[str, Any], line: str, begun: Config) -> None:
    with pytest.raises(CacheError, match=re.escape(line)):
        train(changed(begun, **{table: values}), StopSignal())


def test_a_moved_adapter_and_a_resolved_precision_are_the_same_run(
    begun: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def watched(paths: Sequence[Path]) -> dict[str, str]:
        hashed.extend(path.parent.name for path in paths)
        return sha256_files(paths)

    def onwards(max_train_steps: int) -> Config:
        values = {"initial_adapter": moved, "max_train_steps": max_train_steps, "mixed_precision": "fp32"}
        return changed(begun, train=values)

    monkeypatch.setattr(pretrained, "sha256_files", watched)
    assert begun.train.initial_adapter is not None
    moved = begun.train.initial_adapter.rename(begun.train.initial_adapter.with_name("elsewhere"))
    train(onwards(3), StopSignal())
    assert "transformer" in hashed, "a copy has another inode"
    hashed.clear()
    train(onwards(4), StopSignal())
    assert "transformer" not in hashed, "weights with known marks are not read"
    assert [line["step"] for line in read_metrics(begun.train.output_dir)] == [1, 2, 3, 4]
    shutil.copytree(begun.train.output_dir / "export", moved, dirs_exist_ok=True)  # another adapter, whole
    with pytest.raises(CacheError, match=r"train\.initial_adapter\.sha256 was '[0-9a-f]{64}', is '[0-9a-f]{64}'"):
        train(onwards(5), StopSignal())


def test_another_view_is_another_run(begun: Config, tmp_path: Path) -> None:
    shutil.copytree(begun.precompute.cache, tmp_path / "cache")
    storage = LocalStorage(str(tmp_path / "cache"))
    view = read_view(storage, begun.data.name)
    write_view(storage, replace(view, rows=view.rows[1:]))
    with pytest.raises(CacheError, match=r"made by another run \(view was '[0-9a-f]{32}', is '[0-9a-f]{32}'"):
        train(changed(begun, precompute={"cache": str(storage)}), StopSignal())


def test_another_data_set_is_told_how_to_go_on() -> None:
    with pytest.raises(CacheError, match=r"another train\.output_dir, and this run's export as train\.initial_adapter"):
        refuse_another_run({"view": "a"}, {"view": "b"}, "checkpoint-000002")

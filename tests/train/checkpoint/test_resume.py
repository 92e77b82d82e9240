"""The checkpoint that a run resumes: as asked for, one for all processes, and of this very run."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file

from shared.config import Config
from shared.errors import CacheError, Preempted, UsageError
from shared.fingerprint import sha256_files
from shared.model import pretrained
from shared.run_folder import read_metrics
from shared.signals import StopSignal
from tests import tiny
from tests.train import processes
from tests.train.saved import content, is_content, save
from train.checkpoint.files import STATE, load_checkpoint, save_checkpoint
from train.checkpoint.resume import find_checkpoint, refuse_another_run
from train.loop import train

Settings = Callable[..., Config]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_latest_is_the_newest_or_nothing(run: Path) -> None:
    assert find_checkpoint(run, "latest") is None
    run.mkdir()
    assert find_checkpoint(run, "latest") is None
    save(run, 10)
    save(run, 20)
    assert is_content(find_checkpoint(run, "latest"), 20)


def test_a_name_is_that_checkpoint_if_it_is_the_newest(run: Path) -> None:
    save(run, 10)
    newer = save(run, 20)
    for request in ("checkpoint-000020", "checkpoint-000020/"):
        assert is_content(find_checkpoint(run, request), 20)
    line = r"has newer checkpoints; move checkpoint-000020 to another folder, or set \"latest\"$"
    with pytest.raises(UsageError, match=line):
        find_checkpoint(run, "checkpoint-000010")
    newer.rename(run / "aside")
    assert is_content(find_checkpoint(run, "checkpoint-000010"), 10)


@pytest.mark.parametrize("request_", ["checkpoint-000030", "checkpoint-10", "", "../run/checkpoint-000010", "newest"])
def test_an_unknown_name_is_refused_with_the_known_ones(run: Path, request_: str) -> None:
    save(run, 10)
    save(run, 20)
    with pytest.raises(UsageError, match=r"there are checkpoint-000010, checkpoint-000020$"):
        find_checkpoint(run, request_)
    with pytest.raises(UsageError, match=r"there are none$"):
        find_checkpoint(run / "empty", request_)


def test_a_named_checkpoint_that_is_damaged_is_an_error(run: Path) -> None:
    save(run, 10)
    (save(run, 20) / STATE).unlink()
    with pytest.raises(CacheError, match=r"checkpoint-000020/state\.json: damaged checkpoint"):
        find_checkpoint(run, "checkpoint-000020")


def test_none_refuses_a_run_that_has_checkpoints(run: Path) -> None:
    assert find_checkpoint(run, "none") is None
    save(run, 10)
    with pytest.raises(UsageError, match=r"has checkpoint-000010; choose another train\.output_dir"):
        find_checkpoint(run, "none")


@pytest.mark.parametrize("field", ["identity", "base"])
def test_a_sealed_state_without_a_field_is_refused(run: Path, field: str) -> None:
    groups, state = content(10)
    save_checkpoint(run, 10, groups, {name: value for name, value in state.items() if name != field})
    with pytest.raises(CacheError, match=r"checkpoint-000010/state\.json: no identity or base"):
        find_checkpoint(run, "latest")


def test_tensors_of_another_adapter_are_refused(settings: Settings) -> None:
    config = settings(max_train_steps=1)
    train(config, StopSignal())
    found = load_checkpoint(config.train.output_dir / "checkpoint-000001")
    for groups in ({"optimizer": found.tensors["optimizer"]}, {**found.tensors, "adapter": {}}):
        save_checkpoint(config.train.output_dir, 1, groups, found.state)
        with pytest.raises(CacheError, match=r"adapter\.safetensors: not the tensors of this run"):
            train(settings(max_train_steps=2), StopSignal())


def test_diffusers_loads_a_checkpoint_with_its_alpha(settings: Settings) -> None:
    config = settings(max_train_steps=1)
    train(config, StopSignal())
    pipeline = CogVideoXPipeline.from_pretrained(config.model.pretrained_model_name_or_path)
    weights = []
    for place in ("checkpoint-000001/adapter.safetensors", "export"):
        pipeline.load_lora_weights(str(config.train.output_dir / place), adapter_name="lora")
        layer = pipeline.transformer.transformer_blocks[0].attn1.to_q
        assert layer.scaling["lora"] == 8 / 4
        weights.append(layer.lora_B["lora"].weight)
        pipeline.unload_lora_weights()
    assert torch.equal(*weights) and weights[0].any()


def test_a_named_start_repeats_the_steps_once_newer_ones_are_moved(settings: Settings, tmp_path: Path) -> None:
    values = {"max_train_steps": 6, "checkpointing_steps": 2, "checkpoints_total_limit": 3}
    train(settings(**values), StopSignal())
    folder = settings().train.output_dir
    straight = load_file(folder / "export" / "pytorch_lora_weights.safetensors")
    named = settings(**values, resume_from_checkpoint="checkpoint-000002")
    with pytest.raises(UsageError, match="move checkpoint-000004, checkpoint-000006 to another folder"):
        train(named, StopSignal())
    for step in (4, 6):
        (folder / f"checkpoint-00000{step}").rename(tmp_path / f"checkpoint-00000{step}")
    with pytest.raises(Preempted, match="checkpoint saved at step 3 of 6"):
        train(named, processes.StopAt(folder, 2, poll=2))
    train(settings(**values), StopSignal())
    assert [line["step"] for line in read_metrics(folder)] == list(range(1, 7))
    again = load_file(folder / "export" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(straight[name], again[name]) for name in straight)


def test_a_finished_run_ends_before_anything_is_written(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(max_train_steps=1)
    train(config, StopSignal())
    files = [path for path in config.train.output_dir.rglob("*") if path.is_file()]
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}
    train(config, StopSignal())
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files} == before
    train(settings(max_train_steps=2), StopSignal())
    assert len(read_metrics(config.train.output_dir)) == 2, "another config is not finished"


# One checkpoint for all processes


def train_apart(here: Config, there: Config) -> list[int | None]:
    return processes.finish(processes.start(here, 2, configs={1: there}), others_follow=False)


def test_ranks_without_the_checkpoint_get_it_from_rank_0(settings: Settings) -> None:
    """Rank 0 falls back from a damaged checkpoint; rank 1 is on a machine without the run folder."""
    first = settings(max_train_steps=4, checkpointing_steps=2, ema_decay=0.9)
    train(first, StopSignal())
    folder = first.train.output_dir
    (folder / "checkpoint-000004" / "optimizer.safetensors").write_bytes(b"")
    values = {"max_train_steps": 6, "checkpointing_steps": 2, "ema_decay": 0.9}
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
    return experiment.model_copy(
        update={
            "train": experiment.train.model_copy(update=values),
            "model": experiment.model.model_copy(update={"pretrained_model_name_or_path": str(folder / "model")}),
        }
    )


@pytest.fixture(scope="module")
def two_steps(experiment: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of such a run after two steps."""
    folder = tmp_path_factory.mktemp("two_steps")
    shutil.copytree(experiment.model.pretrained_model_name_or_path, folder / "model")
    values = {"output_dir": folder / "first", "max_train_steps": 1}
    train(experiment.model_copy(update={"train": experiment.train.model_copy(update=values)}), StopSignal())
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
        ("train", {"ema_decay": 0.5}, "train.ema_decay was 0.0, is 0.5"),
        (
            "memory",
            {"base_precision": "int8", "allow_low_cosine": True},
            "memory.base_precision was 'model', is 'int8'",
        ),
    ],
)
def test_another_setting_is_another_run(table: str, values: dict[str, Any], line: str, begun: Config) -> None:
    changed = begun.model_copy(update={table: getattr(begun, table).model_copy(update=values)})
    with pytest.raises(CacheError, match=re.escape(line)):
        train(changed, StopSignal())


def test_the_precision_that_auto_resolved_to_is_the_same_run(begun: Config) -> None:
    train(begun.model_copy(update={"train": begun.train.model_copy(update={"mixed_precision": "fp32"})}), StopSignal())
    assert [line["step"] for line in read_metrics(begun.train.output_dir)] == [1, 2, 3, 4]


def test_an_initial_adapter_is_known_by_bytes_not_path(begun: Config) -> None:
    assert begun.train.initial_adapter is not None
    moved = begun.train.initial_adapter.rename(begun.train.initial_adapter.with_name("elsewhere"))
    onwards = begun.model_copy(update={"train": begun.train.model_copy(update={"initial_adapter": moved})})
    train(onwards.model_copy(update={"train": onwards.train.model_copy(update={"max_train_steps": 3})}), StopSignal())
    shutil.copytree(begun.train.output_dir / "export", moved, dirs_exist_ok=True)  # another adapter, whole
    with pytest.raises(CacheError, match=r"train\.initial_adapter\.sha256 was '[0-9a-f]{64}', is '[0-9a-f]{64}'"):
        train(onwards, StopSignal())


def test_weights_with_known_marks_are_not_read(begun: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def watched(paths: Sequence[Path]) -> dict[str, str]:
        hashed.extend(path.parent.name for path in paths)
        return sha256_files(paths)

    monkeypatch.setattr(pretrained, "sha256_files", watched)
    train(begun.model_copy(update={"train": begun.train.model_copy(update={"max_train_steps": 3})}), StopSignal())
    assert "transformer" in hashed, "a copy has another inode"
    hashed.clear()
    train(begun, StopSignal())
    assert "transformer" not in hashed


def test_another_data_set_is_told_how_to_go_on() -> None:
    with pytest.raises(CacheError, match=r"another train\.output_dir, and this run's export as train\.initial_adapter"):
        refuse_another_run({"view": "a"}, {"view": "b"}, "checkpoint-000002")

"""Where a run goes on: what is asked for, branches, one checkpoint for all processes, and of this very run."""

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shared.config import Config
from shared.errors import CacheError, Preempted, UsageError
from shared.fingerprint import sha256_files
from shared.model import pretrained
from shared.signals import StopSignal
from tests import tiny
from tests.experiments import fill_cache, write_experiment
from tests.train import processes
from tests.train.checkpoint.test_files import STATE, content, is_content, names, save, silence
from train.checkpoint.files import load_checkpoint, save_checkpoint
from train.checkpoint.resume import BRANCH, abandon_newer, branch_of, find_checkpoint
from train.loop import train
from train.metrics import read_metrics

Settings = Callable[..., Config]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_latest_is_the_newest_or_nothing(run: Path) -> None:
    assert find_checkpoint(run, "latest", report=silence) is None
    run.mkdir()
    assert find_checkpoint(run, "latest", report=silence) is None
    save(run, 10)
    save(run, 20)
    found = find_checkpoint(run, "latest", report=silence)
    assert found is not None
    assert is_content(found, 20)


@pytest.mark.parametrize("request_", ["checkpoint-000010", "checkpoint-000010/"])
def test_a_name_is_that_checkpoint(run: Path, request_: str) -> None:
    save(run, 10)
    save(run, 20)
    found = find_checkpoint(run, request_, report=silence)
    assert found is not None
    assert is_content(found, 10)


@pytest.mark.parametrize("request_", ["checkpoint-000030", "checkpoint-10", "", "../run/checkpoint-000010", "newest"])
def test_an_unknown_name_is_refused_with_those_there_are(run: Path, request_: str) -> None:
    save(run, 10)
    save(run, 20)
    with pytest.raises(UsageError, match=r"there are checkpoint-000010, checkpoint-000020$"):
        find_checkpoint(run, request_, report=silence)
    with pytest.raises(UsageError, match=r"there are none$"):
        find_checkpoint(run / "empty", request_, report=silence)


def test_a_named_checkpoint_that_is_damaged_is_an_error_and_not_another_one(run: Path) -> None:
    save(run, 10)
    (save(run, 20) / STATE).unlink()
    with pytest.raises(CacheError, match=r"checkpoint-000020: damaged checkpoint: state\.json"):
        find_checkpoint(run, "checkpoint-000020", report=silence)


def test_none_starts_anew_and_refuses_a_run_that_has_checkpoints(run: Path) -> None:
    assert find_checkpoint(run, "none", report=silence) is None
    save(run, 10)
    with pytest.raises(UsageError, match=r"has checkpoint-000010: choose another train\.output_dir"):
        find_checkpoint(run, "none", report=silence)


# Branches


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("checkpoint-*"))


def test_a_named_start_leaves_the_newer_ones_aside_and_the_same_command_goes_on_with_its_branch(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from shared import console

    shown: list[str] = []
    monkeypatch.setattr(console, "say", shown.append)
    values = {"max_train_steps": 8, "checkpointing_steps": 2, "checkpoints_total_limit": 3}
    train(settings(**values), StopSignal())
    folder = settings().train.output_dir
    straight = load_file(folder / "export" / "pytorch_lora_weights.safetensors")
    assert checkpoints(folder) == ["checkpoint-000004", "checkpoint-000006", "checkpoint-000008"]

    named = settings(**values, resume_from_checkpoint="checkpoint-000004")
    with pytest.raises(Preempted):
        train(named, processes.Stopping(1))
    aside = ["abandoned-1/checkpoint-000006", "abandoned-1/checkpoint-000008"]
    assert checkpoints(folder) == [*aside, "checkpoint-000004", "checkpoint-000005"]
    assert any(line.endswith(f"checkpoint-000006, checkpoint-000008 moved to {folder}/abandoned-1") for line in shown)
    assert load_checkpoint(folder / aside[0]).step == 6

    shown.clear()
    train(named, StopSignal())
    assert f"going on from {folder}/checkpoint-000005 at step 5 of 8" in shown
    assert checkpoints(folder) == [*aside, *(f"checkpoint-00000{step}" for step in (5, 6, 8))]
    assert [line["step"] for line in read_metrics(folder)] == list(range(1, 9))
    again = load_file(folder / "export" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(straight[name], again[name]) for name in straight)


def save_of_branch(run: Path, step: int, start: Path | None) -> Path:
    """A checkpoint of the branch that began at `start`."""
    branch = None if start is None else branch_of(load_checkpoint(start), start.name)
    groups, state = content(step)
    return save_checkpoint(run, step, groups, state | {BRANCH: branch})


def found(run: Path, request: str) -> int:
    checkpoint = find_checkpoint(run, request, report=lambda _: None)
    assert checkpoint is not None
    return checkpoint.step


def test_a_name_goes_on_with_its_own_branch_only(run: Path) -> None:
    for step in (20, 40, 60):
        save_of_branch(run, step, None)
    assert found(run, "checkpoint-000040") == 40, "60 is of no branch"
    save_of_branch(run, 80, run / "checkpoint-000040")
    assert found(run, "checkpoint-000040") == 80
    assert found(run, "checkpoint-000040/") == 80
    assert found(run, "checkpoint-000020") == 20, "80 began at 40"
    (run / "checkpoint-000080" / STATE).write_bytes(b"{}")
    assert found(run, "checkpoint-000040") == 40, "60 is the newest that is intact"
    save_of_branch(run, 70, run / "checkpoint-000040")
    assert found(run, "checkpoint-000040") == 70, "damage beyond it is passed over"


def test_a_branch_goes_on_when_its_start_was_pruned_but_not_when_another_took_its_place(run: Path) -> None:
    start = save_of_branch(run, 40, None)
    save_of_branch(run, 60, start)
    shutil.rmtree(start)
    assert found(run, "checkpoint-000040") == 60
    save(run, 40, variant=1)
    assert found(run, "checkpoint-000040") == 40


def test_latest_stays_in_the_branch(run: Path) -> None:
    start = save_of_branch(run, 40, None)
    latest = load_checkpoint(save_of_branch(run, 60, start))
    assert branch_of(latest, "latest") == {"from": "checkpoint-000040", "commit": load_checkpoint(start).commit}
    assert branch_of(load_checkpoint(start), "latest") is None
    assert branch_of(None, "latest") is None


def test_each_abandoned_branch_has_a_folder_of_its_own(run: Path) -> None:
    lines: list[str] = []
    for _ in range(3):
        start = save(run, 10)
        save(run, 20)
        abandon_newer(run, load_checkpoint(start), report=lines.append)
        abandon_newer(run, load_checkpoint(start), report=lines.append)
    assert names(run) == ["abandoned-1", "abandoned-2", "abandoned-3", "checkpoint-000010"]
    assert len(lines) == 3
    (run / "abandoned-2" / "checkpoint-000020").rename(run / "checkpoint-000020")
    assert is_content(load_checkpoint(run / "checkpoint-000020"), 20), "moved back, it is a checkpoint again"


# One checkpoint for all processes


def nothing(folder: Path) -> None:
    shutil.rmtree(folder)


def an_older_one_only(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoint-000004")


def another_under_its_name(folder: Path) -> None:
    checkpoint = load_checkpoint(folder / "checkpoint-000004")
    adapter = {name: tensor + 1 for name, tensor in checkpoint.tensors["adapter"].items()}
    save_checkpoint(folder, 4, checkpoint.tensors | {"adapter": adapter}, checkpoint.state)


def damage(folder: Path) -> None:
    (folder / "checkpoint-000004" / "optimizer.safetensors").write_bytes(b"")


@pytest.fixture
def two_folders(settings: Settings) -> tuple[Config, Config]:
    """Four of six steps in a folder and in a copy of it, as on two machines with an output_dir each."""
    first = settings(max_train_steps=4, checkpointing_steps=2)
    train(first, StopSignal())
    shutil.copytree(first.train.output_dir, settings("other").train.output_dir)
    values = {"max_train_steps": 6, "checkpointing_steps": 2}
    return settings(**values), settings("other", **values)


def train_apart(here: Config, there: Config) -> list[int | None]:
    return processes.finish(processes.start(here, 2, configs={1: there}), others_follow=False)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (nothing, "checkpoint-000004: damaged checkpoint: COMMIT.json: No such file or directory"),
        (an_older_one_only, "checkpoint-000004: damaged checkpoint: COMMIT.json: No such file or directory"),
        (another_under_its_name, "checkpoint-000004: another checkpoint than rank 0 has under this name"),
        (damage, "checkpoint-000004: damaged checkpoint: optimizer.safetensors: 0 bytes instead of"),
    ],
)
def test_a_rank_that_cannot_load_what_rank_0_chose_ends_all_with_one_line(
    change: Callable[[Path], None], line: str, two_folders: tuple[Config, Config]
) -> None:
    here, there = two_folders
    change(there.train.output_dir)
    assert train_apart(here, there) == [4, 4]
    ends = [processes.log(config, rank).splitlines()[-1] for rank, config in enumerate(two_folders)]
    assert ends[0] == ends[1]
    assert ends[0].startswith(f"precog: rank 1: {there.train.output_dir}/{line}")
    assert ends[0].endswith("rank 0 chose it, and all processes have to see one and the same train.output_dir")


def test_all_ranks_fall_back_with_rank_0(two_folders: tuple[Config, Config]) -> None:
    here, there = two_folders
    damage(here.train.output_dir)
    assert train_apart(here, there) == [0, 0], processes.log(there, 1)
    assert f"going on from {here.train.output_dir}/checkpoint-000002 at step 2 of 6" in processes.log(here)


def test_ranks_of_different_runs_do_not_take_a_step_together(settings: Settings) -> None:
    here, there = settings(), settings(seed=1)
    assert train_apart(here, there) == [4, 4]
    for rank in range(2):
        last = processes.log(here, rank).splitlines()[-1]
        assert last.startswith("precog: rank 1: another run than that of rank 0 (train.seed is 1 there, 42 on rank 0)")
    assert not (here.train.output_dir / "metrics.jsonl").exists()


# Of this very run


def other_weights(model: Path) -> None:
    tiny.build_transformer("2b", seed=1).save_pretrained(model / "transformer")


def other_config(model: Path) -> None:
    file = model / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"norm_eps": 1e-4}), "utf-8")


def begun_in(folder: Path, experiment: Config, max_train_steps: int) -> Config:
    """A run on a checkpoint of its own, from an adapter that was exported before."""
    values = {"output_dir": folder / "run", "initial_adapter": folder / "adapter", "max_train_steps": max_train_steps}
    return experiment.model_copy(
        update={
            "train": experiment.train.model_copy(update=values),
            "model": experiment.model.model_copy(update={"pretrained_model_name_or_path": str(folder / "model")}),
        }
    )


@pytest.fixture(scope="module")
def two_steps(experiment: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of such a run after two steps."""
    folder = tmp_path_factory.mktemp("two_steps")
    shutil.copytree(experiment.model.pretrained_model_name_or_path, folder / "model")
    values = {"output_dir": folder / "first", "max_train_steps": 1}
    train(experiment.model_copy(update={"train": experiment.train.model_copy(update=values)}), StopSignal())
    (folder / "first" / "export").rename(folder / "adapter")
    train(begun_in(folder, experiment, 2), StopSignal())
    return folder


@pytest.fixture
def begun(two_steps: Path, experiment: Config, tmp_path: Path) -> Config:
    """The run that would go on to four steps."""
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
        (
            "memory",
            {"base_precision": "int8", "allow_low_cosine": True},
            "memory.base_precision was 'model', is 'int8'",
        ),
    ],
)
def test_another_form_of_the_base_is_another_run(table: str, values: dict[str, Any], line: str, begun: Config) -> None:
    changed = begun.model_copy(update={table: getattr(begun, table).model_copy(update=values)})
    with pytest.raises(CacheError, match=re.escape(line)):
        train(changed, StopSignal())


def test_a_base_without_its_learned_positions_is_another_run(tmp_path: Path) -> None:
    config = write_experiment("5b-i2v", tmp_path, max_train_steps=1, lora_rank=2)
    fill_cache(config)
    train(config, StopSignal())
    dropped = config.model_copy(update={"model": config.model.model_copy(update={"drop_learned_positions": True})})
    with pytest.raises(CacheError, match=r"model\.drop_learned_positions was False, is True"):
        train(dropped, StopSignal())


def test_the_precision_that_auto_came_to_is_the_same_run(begun: Config) -> None:
    train(begun.model_copy(update={"train": begun.train.model_copy(update={"mixed_precision": "fp32"})}), StopSignal())
    assert [line["step"] for line in read_metrics(begun.train.output_dir)] == [1, 2, 3, 4]


def test_an_initial_adapter_is_known_by_its_bytes_and_not_by_its_path(begun: Config) -> None:
    assert begun.train.initial_adapter is not None
    moved = begun.train.initial_adapter.rename(begun.train.initial_adapter.with_name("elsewhere"))
    onwards = begun.model_copy(update={"train": begun.train.model_copy(update={"initial_adapter": moved})})
    train(onwards.model_copy(update={"train": onwards.train.model_copy(update={"max_train_steps": 3})}), StopSignal())
    file = moved / "pytorch_lora_weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CacheError, match=r"train\.initial_adapter\.sha256 was '[0-9a-f]{64}', is '[0-9a-f]{64}'"):
        train(onwards, StopSignal())


def test_weights_of_known_size_and_time_are_not_read_again(begun: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def watched(paths: Sequence[Path]) -> dict[str, str]:
        hashed.extend(path.name for path in paths)
        return sha256_files(paths)

    monkeypatch.setattr(pretrained, "sha256_files", watched)
    weights = "diffusion_pytorch_model.safetensors"
    train(begun.model_copy(update={"train": begun.train.model_copy(update={"max_train_steps": 3})}), StopSignal())
    assert hashed == []
    os.utime(Path(begun.model.pretrained_model_name_or_path) / "transformer" / weights, ns=(1, 1))
    train(begun, StopSignal())
    assert hashed == [weights], "another time, the same bytes"
    assert [line["step"] for line in read_metrics(begun.train.output_dir)] == [1, 2, 3, 4]


@pytest.mark.parametrize("field", ["adam_beta1", "adam_beta2", "adam_epsilon"])
def test_another_adam_is_another_run(field: str, settings: Settings) -> None:
    train(settings(max_train_steps=1), StopSignal())
    with pytest.raises(CacheError, match=f"another run .train.{field} was"):
        train(settings(max_train_steps=2, **{field: 0.5}), StopSignal())

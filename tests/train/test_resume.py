"""Where a run goes on: what is asked for, branches, one checkpoint for all processes, and of this very run."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.config import Config
from shared.errors import CacheError, Preempted, UsageError
from shared.preemption import StopSignal
from tests.train.test_checkpoint import STATE, is_content, names, save, silence
from train.checkpoint import load_checkpoint
from train.loop import train
from train.metrics import read_metrics
from train.resume import BRANCH, abandon_newer, branch_of, find_checkpoint

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


class Stopping(StopSignal):
    """A signal that comes in the `number`th step (from 1)."""

    def __init__(self, number: int) -> None:
        self._polls = 0
        self._number = number
        super().__init__()

    @property
    def requested(self) -> bool:
        self._polls += 1
        return self._polls >= self._number

    @requested.setter
    def requested(self, value: bool) -> None:
        pass


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
        train(named, Stopping(1))
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
    from tests.train.test_checkpoint import content
    from train.checkpoint import save_checkpoint

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

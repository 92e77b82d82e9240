"""Tests of sweeps: the grid, refusals before anything runs, one process per run, interruption, the table."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.config import Config
from shared.config_file import save_config
from shared.errors import CacheError, UsageError
from shared.run_folder import read_metrics
from shared.signals import StopSignal
from tests.experiments import changed
from train.loop import train
from train.sweep import CSV_NAME, parse_axis, plan_sweep, run_sweep

Settings = Callable[..., Config]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(settings: Settings, tmp_path: Path) -> Path:
    save_config(settings("sweep", max_train_steps=4, checkpointing_steps=1), tmp_path / "config.toml")
    return tmp_path / "config.toml"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("train.learning_rate=1e-4,3e-4", ["0.0001", "0.0003"]),
        ("memory.base_precision=model,int8", ["model", "int8"]),
        ('train.lora_target_modules=["to_q"],["to_q","to_k"]', 2),
    ],
)
def test_an_axis_is_a_field_and_its_values(text: str, values: list[str] | int) -> None:
    field, found = parse_axis(text)
    assert field == text.partition("=")[0]
    assert len(found) == values if isinstance(values, int) else found == values


def test_the_grid_is_every_combination_in_folders_named_by_the_values(path: Path) -> None:
    runs = plan_sweep(path, ["train.seed=1"], ["train.learning_rate=1e-4,3e-4", "train.lora_rank=2,8"])
    assert [run.name for run in runs] == [
        "learning_rate=0.0001_lora_rank=2",
        "learning_rate=0.0001_lora_rank=8",
        "learning_rate=0.0003_lora_rank=2",
        "learning_rate=0.0003_lora_rank=8",
    ]
    assert {(run.config.train.learning_rate, run.config.train.lora_rank) for run in runs} == {
        (rate, rank) for rate in (1e-4, 3e-4) for rank in (2, 8)
    }
    assert all(run.config.train.seed == 1 and run.folder.name == run.name for run in runs)


@pytest.mark.parametrize(
    ("grid", "line"),
    [
        (["train.lora_rnk=1,2"], "did you mean train.lora_rank"),
        (["train.lora_rank=1,1.0,1"], "are the same run"),
        (["train.lora_rank=1", "train.lora_rank=2"], "given twice"),
        (["train.output_dir=a,b"], "and not train.output_dir"),
        (["precompute.cache=a,b"], "must be a field of model, train, memory"),
        (["train.lora_rank"], "expected table.field=value"),
        (["train.lora_rank=1,,2"], "expected table.field=value"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_starts(
    grid: list[str], line: str, path: Path, settings: Settings
) -> None:
    with pytest.raises(UsageError, match=line):
        plan_sweep(path, [], grid)
    assert not settings("sweep").train.output_dir.exists()


def test_a_sweep_ranks_finished_runs_by_held_out_loss(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the runs are finished before, and none is run again; the long tests below start processes."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    runs = plan_sweep(path, [], ["train.learning_rate=1e-3,1e-1"])
    for run in runs:
        train(run.config, StopSignal())
    rows = run_sweep(path, runs, 2, StopSignal())
    assert_table(runs[0].folder.parent, 4)
    assert [row["run"] for row in rows] == ["learning_rate=0.1", "learning_rate=0.001"]
    assert not list(path.parent.rglob("log.txt")) and (runs[0].folder.parent / "sweep.html").exists()


def test_a_sweep_without_its_view_starts_nothing(settings: Settings, tmp_path: Path) -> None:
    config = settings("sweep")
    save_config(changed(config, data={"fps": 4.0}), tmp_path / "config.toml")
    runs = plan_sweep(tmp_path / "config.toml", [], ["train.learning_rate=1e-3,1e-1"])
    with pytest.raises(CacheError, match=r"data\.fps was 0\.0, is 4\.0; run `precog precompute`"):
        run_sweep(tmp_path / "config.toml", runs, 2, StopSignal())
    assert not config.train.output_dir.exists()


def assert_table(folder: Path, steps: int) -> None:
    with (folder / CSV_NAME).open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["status"], row["step"]) for row in rows] == [("finished", str(steps))] * 2
    losses = [float(row["held_out_loss"]) for row in rows]
    assert losses[0] < losses[1]
    assert len({row["base_held_out_loss"] for row in rows}) == 1, "every run has the same clips and noise"
    for row in rows:
        lines = read_metrics(folder / row["run"])
        assert float(row["held_out_loss"]) == lines[-1]["held_out_loss"]
        assert [line["step"] for line in lines] == list(range(1, steps + 1))


def sweep(path: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "precog", "sweep", str(path), "--grid", "train.learning_rate=1e-3,1e-2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.faults
def test_an_interrupted_sweep_saves_its_runs_and_goes_on(path: Path, settings: Settings) -> None:
    folder = settings("sweep").train.output_dir
    names = ["learning_rate=0.001", "learning_rate=0.01"]
    first = sweep(path, "train.max_train_steps=20000", "--jobs", "2")
    while not all(read_metrics(folder / name) for name in names):
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    _, shown = first.communicate(timeout=300)
    assert first.returncode == 75, shown
    assert "0 of 2 runs are finished; the same command goes on from here" in shown
    with (folder / CSV_NAME).open(encoding="utf-8", newline="") as stream:
        assert [row["status"] for row in csv.DictReader(stream)] == ["stopped"] * 2
    done = {name: len(read_metrics(folder / name)) for name in names}
    assert all((folder / name / f"checkpoint-{step:06}").exists() for name, step in done.items())

    last = max(done.values()) + 2
    second = sweep(path, f"train.max_train_steps={last}", "--jobs", "2")
    _, shown = second.communicate(timeout=300)
    assert second.returncode == 0, shown
    assert_table(folder, last)
    assert "resuming from" in (folder / names[0] / "log.txt").read_text(encoding="utf-8")


@pytest.mark.faults
def test_a_run_that_fails_is_in_the_table_and_does_not_stop_the_others(path: Path, settings: Settings) -> None:
    folder = settings("sweep").train.output_dir
    (folder / "learning_rate=0.001").mkdir(parents=True)
    (folder / "learning_rate=0.001" / "metrics.jsonl").write_text("nonsense\n")
    process = sweep(path, "--json")
    found, shown = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "1 of 2 runs failed; read" in shown
    with (folder / CSV_NAME).open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["status"] for row in rows] == ["finished", "exit code 3, see log.txt"]
    assert [row["run"] for row in json.loads(found)["runs"]] == [row["run"] for row in rows]

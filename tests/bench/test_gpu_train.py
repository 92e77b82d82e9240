"""Tests that the GPU benchmark of stage 2 runs on a CPU; its figures are not tested."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_train, record
from bench.arms import ARMS, Arm, Case
from bench.gpu_train import DRY, TINY, main, run_case
from bench.models import PUBLISHED
from shared.model.geometry import Bucket
from train.transformer.engine import Plan

CONFIG = PUBLISHED["5b"] | TINY
BUCKET = Bucket(9, 64, 96)
CPU = torch.device("cpu")


@pytest.mark.faults  # half a minute
@pytest.mark.filterwarnings("default")  # of what torch.compile imports
def test_a_dry_run_goes_through_every_arm_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    assert main(["--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(("| ours", "| reference")) and " / " not in line]
    timed = [row for row in rows if float(row.split("|")[2]) > 0]
    gates = [line for line in lines if "cosine" in line]
    assert len(timed) == len(gates) == sum(len(case.arms) for case in DRY)
    assert not (tmp_path / "results").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_ends_with_two_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--piece", "1"]) == 2
    shown = capsys.readouterr().err
    assert "CUDA not found" in shown and shown.count("\n") == 1


def run(names: list[str]) -> dict[str, Any]:
    return run_case(Case("5b", BUCKET, 4, names, soak_steps=1), CONFIG, CPU, 1, time.monotonic() + 100, 1e12)


@pytest.mark.faults
def test_an_arm_that_fails_is_not_timed_and_the_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARMS, "broken", Arm(Plan(attention="cudnn")))
    found = run(["reference", "broken", "ours, lean"])
    rows = found["arms"]
    assert "cudnn" in rows["broken"]["failure"] and not rows["broken"]["seconds"]
    assert all(rows[name]["seconds_per_step"] > 0 for name in ("reference", "ours, lean"))
    assert found["soak"]["steps"] == 1


@pytest.mark.faults
def test_an_arm_with_other_gradients_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_train, "LEAST_COSINE", 1.1)
    (row,) = run(["ours, block_input"])["arms"].values()
    assert "does not compute what" in row["failure"] and not row["seconds"]

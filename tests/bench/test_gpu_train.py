"""Tests that the GPU benchmark of stage 2 runs on a CPU; its figures are not tested."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import gpu_train, record
from bench.arms import ARMS, Arm, Case, Stage
from bench.gpu_train import DRY, PIECES, TINY, main, run_case
from bench.models import PUBLISHED
from shared.model.geometry import Bucket
from train.transformer.engine import Plan

CONFIG = PUBLISHED["5b"] | TINY
BUCKET = Bucket(9, 64, 96)
CPU = torch.device("cpu")


@pytest.mark.faults  # half a minute
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


class AttentionWatch(TorchDispatchMode):
    """Record of torch's permission to use math attention in each backward pass of attention."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.math_enabled: set[bool] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in func.__name__ and "backward" in func.__name__:
            self.math_enabled.add(torch.backends.cuda.math_sdp_enabled())  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile reads it
@pytest.mark.parametrize(("name", "enabled"), [("reference", True), ("reference, cuDNN, compiled", False)])
def test_the_reference_keeps_its_attention_kernel_in_the_backward_pass(name: str, enabled: bool) -> None:
    """Checkpointing recomputes attention there: another kernel would keep other tensors, and fail."""
    take_pass = Stage(Case("5b", BUCKET, 4, [name]), CONFIG, CPU).enter(ARMS[name])
    with AttentionWatch() as watch:
        take_pass()
    assert watch.math_enabled == {enabled}


def test_the_four_pieces_cover_every_model_arm_and_level() -> None:
    cases = [case for piece in PIECES.values() for case in piece]
    assert {(case.variant, str(case.bucket)) for case in cases if not case.soak_steps} == {
        ("2b", "49x480x720"),
        ("5b", "49x480x720"),
        ("1.5-5b", "81x768x1360"),
    }
    for variant in PUBLISHED:
        assert {64, 128} <= {case.lora_rank for case in cases if case.variant == variant}
    assert set(ARMS) == {name for case in cases for name in case.arms}
    plans = [arm.plan for arm in ARMS.values() if arm.plan is not None]
    assert {plan.activations for plan in plans} == {"block_input", "attention_output", "full"}

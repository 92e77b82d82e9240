"""The benchmarks run; what they say is not tested."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import arms
from bench.arms import ARMS, Case
from bench.gpu_train import PIECES, TINY, run_case
from bench.models import PUBLISHED
from shared.model.geometry import Bucket
from train.objective import clip_loss
from train.transformer.forward import predict

ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gpu_train", *arguments]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=alone)


@pytest.mark.faults  # half a minute
def test_a_dry_run_goes_through_every_arm_and_writes_nothing() -> None:
    before = set((ROOT / "bench" / "results").iterdir())
    done = bench("--dry-run")
    assert done.returncode == 0, done.stderr
    rows = [
        line for line in done.stdout.splitlines() if line.startswith(("| ours", "| reference")) and " / " not in line
    ]
    timed = [row for row in rows if float(row.split("|")[2]) > 0]
    gates = [line for line in done.stdout.splitlines() if "cosine" in line]
    assert len(timed) == len(gates) == len(ARMS) + 4 + 4, done.stdout
    assert set((ROOT / "bench" / "results").iterdir()) == before


@pytest.mark.faults
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_two_and_one_line() -> None:
    done = bench("--piece", "1")
    assert done.returncode == 2
    assert "needs a CUDA GPU" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [("raises", "KeyError: 'broken'"), pytest.param("strays", "does not compute what", marks=pytest.mark.faults)],
)
def test_an_arm_that_fails_or_strays_is_not_timed_and_the_others_are(
    fault: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(transformer, clips, conventions, engine):
        velocities = predict(transformer, clips, conventions, engine)
        if engine.activations != "block_input":
            return velocities
        if fault == "raises":
            raise KeyError("broken")
        return [2 * velocity for velocity in velocities]

    monkeypatch.setattr(arms, "predict", broken)
    case = Case("5b", Bucket(9, 64, 96), 4, ["reference", "ours, block_input", "ours, lean"], soak_steps=1)
    found = run_case(case, PUBLISHED["5b"] | TINY, torch.device("cpu"), 1, time.monotonic() + 100, 1e12)
    rows = found["arms"]
    assert words in rows["ours, block_input"]["failure"] and not rows["ours, block_input"]["seconds"]
    assert all(rows[name]["seconds_per_step"] > 0 for name in ("reference", "ours, lean"))
    assert found["soak"]["steps"] == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at it
def test_the_reference_keeps_its_kernel_of_attention_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where checkpointing computes attention again: with another kernel it would keep other tensors, and fail."""
    allowed: list[bool] = []

    def watched(velocity, target):
        velocity.register_hook(lambda gradient: allowed.append(torch.backends.cuda.math_sdp_enabled()))
        return clip_loss(velocity, target)

    monkeypatch.setattr(arms, "clip_loss", watched)
    names = ["reference", "reference, cuDNN, compiled"]
    case = Case("5b", Bucket(9, 64, 96), 4, names)
    stage = arms.Stage(case, PUBLISHED["5b"] | TINY, torch.device("cpu"))
    for name in names:
        stage.enter(ARMS[name])()
    assert allowed == [True, False]


def test_what_is_to_be_measured_is_in_the_four_pieces() -> None:
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
    assert max(case.soak_steps for case in cases) == 300

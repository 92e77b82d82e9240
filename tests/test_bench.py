"""The benchmarks run; what they say is not tested."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gpu_train", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.faults  # half a minute
def test_a_dry_run_goes_through_every_arm_and_writes_nothing() -> None:
    before = set((ROOT / "bench" / "results").iterdir())
    done = bench("--dry-run")
    assert done.returncode == 0, done.stderr
    timed = [line for line in done.stdout.splitlines() if "seconds_per_step" in line]
    gates = [line for line in done.stdout.splitlines() if "cosine" in line]
    assert len(timed) == len(gates) == 10, done.stdout
    assert set((ROOT / "bench" / "results").iterdir()) == before


@pytest.mark.faults
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_two_and_one_line() -> None:
    done = bench("--piece", "1")
    assert done.returncode == 2
    assert "needs a CUDA GPU" in done.stderr and done.stderr.count("\n") == 1

"""Tests of the first hour's plumbing on a CPU; its figures are not tested."""

import sys
from pathlib import Path

import pytest
import torch

from bench import record
from bench.first_gpu import NEEDS_A_GPU, POINTS, Point, as_markdown, main, run_point


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_ends_with_two_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr().err
    assert "CUDA not found" in shown and shown.count("\n") == 1


def test_a_point_that_fails_hangs_or_dies_is_reported() -> None:
    programs = {
        "ok": "print('FIGURES {\"a\": 1}')",
        "exit 3": "import sys; sys.exit('bad' if False else 3)",
        "exit -9": "import os; os.kill(os.getpid(), 9)",
        "not done in 2 s": "import time; time.sleep(60)",
    }
    points = {}
    for number, (result, program) in enumerate(programs.items()):
        point = Point("test", command=[sys.executable, "-S", "-c", program])
        points[number] = run_point(0, point, "cpu", limit_seconds=2)
        assert points[number]["result"] == result
    assert points[0]["figures"] == {"a": 1}
    assert run_point(0, Point("test", needs="no-such-program"), "cpu")["result"].startswith("not run")
    assert "| not done in 2 s |" in as_markdown({"points": points, "circumstances": record.circumstances()})


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_a_dry_run_takes_every_point_that_a_cpu_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    assert main(["--dry-run"]) == 0
    assert capsys.readouterr().out.count(": ok\n") == len(POINTS.keys() - NEEDS_A_GPU)
    assert not (tmp_path / "results").exists()

"""Tests of the GPU benchmark of stage 1, on a CPU: every arm runs, and the published sizes can be built."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from transformers import T5Config, T5EncoderModel

from bench import encoding, record
from bench.gpu_precompute import SETTINGS, main


@pytest.mark.faults
@pytest.mark.filterwarnings("default")  # of what torch.compile imports
def test_a_dry_run_goes_through_every_arm_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    assert main(["--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (kind, _) in SETTINGS.items():
        [line] = [line for line in lines if line.startswith(f"{name} {{")]
        row = json.loads(line.removeprefix(name))
        assert row[f"{kind}_per_second"] > 0 and "peak_gib" in row
        assert kind == "prompts" or 0 <= row["waited_for_decode"] + row["waited_for_write"] <= 1
    assert not (tmp_path / "results").exists()


def test_the_published_sizes_can_be_built() -> None:
    with torch.device("meta"):
        vae, t5 = AutoencoderKLCogVideoX(**encoding.VAE), T5EncoderModel(T5Config(**encoding.T5))
    sizes = [round(sum(weight.numel() for weight in part.parameters()) / 1e6) for part in (vae, t5)]
    assert sizes == [216, 4762]  # millions, as published


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_ends_with_two_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr().err
    assert "CUDA not found" in shown and shown.count("\n") == 1

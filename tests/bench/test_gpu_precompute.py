"""The benchmark of stage 1 on a GPU, without one: every arm runs, and what is built at the published size can be."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from transformers import T5Config, T5EncoderModel

from bench import encoding
from bench.gpu_precompute import SETTINGS
from precompute.discover import survey
from precompute.run import decode_pool
from precompute.stage import open_stage
from shared.model.geometry import Bucket

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gpu_precompute", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_a_dry_run_goes_through_every_arm_and_writes_nothing() -> None:
    before = set((ROOT / "bench" / "results").iterdir())
    done = bench("--dry-run")
    assert done.returncode == 0, done.stderr
    for name, (kind, _) in SETTINGS.items():
        [line] = [line for line in done.stdout.splitlines() if line.startswith(f"{name} {{")]
        row = json.loads(line.removeprefix(name))
        assert row[f"{kind}_per_second"] > 0 and "peak_gib" in row
        assert kind == "prompts" or 0 <= row["waited_for_decode"] + row["waited_for_write"] <= 1
    assert set((ROOT / "bench" / "results").iterdir()) == before


def test_the_published_sizes_can_be_built_and_their_clips_are_not_refused(tmp_path: Path) -> None:
    """On no device, and with tiny encoders: what a first run on a GPU would otherwise stumble over."""
    with torch.device("meta"):
        vae, t5 = AutoencoderKLCogVideoX(**encoding.VAE), T5EncoderModel(T5Config(**encoding.T5))
    sizes = [round(sum(weight.numel() for weight in part.parameters()) / 1e6) for part in (vae, t5)]
    assert sizes == [216, 4762]  # millions, as published
    bucket = Bucket(49, 480, 720)
    encoding.save_encoders(tmp_path / "pipeline", encoding.TINY_VAE, encoding.TINY_T5, torch.device("cpu"))
    clips = encoding._clips(tmp_path, 1, bucket)
    scene = encoding.Scene(tmp_path / "pipeline", clips, None, bucket, torch.device("cpu"))
    config = encoding.config_for(scene, clips, tmp_path / "cache", {})
    with decode_pool(config) as pool:
        wanted = survey(open_stage(config), pool)
    assert [clip.window.bucket for clip in wanted.clips] == [bucket] and wanted.left_out == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_two_and_one_line() -> None:
    done = bench()
    assert done.returncode == 2
    assert "needs a CUDA GPU" in done.stderr and done.stderr.count("\n") == 1

"""`precog sample` as a command: stopped and repeated, and shared out over processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from precog import app
from shared.config import Train
from tests.processes import fork_command, wait_until
from tests.tiny import build_transformer, save_pipeline
from train.export import export_adapter

ROOT = Path(__file__).parents[2]


def write_config(folder: Path, prompts: int, steps: int) -> list[str]:
    """Write a tiny checkpoint and a trained LoRA; return the arguments of `precog sample`."""
    train = Train(output_dir=folder / "run", lora_rank=4, lora_alpha=8)
    save_pipeline("2b", folder / "model")
    export_adapter(build_transformer("2b", lora_rank=4), train, folder / "run" / "export", {})
    (folder / "prompts.txt").write_text("".join(f"a rabbit {number}\n" for number in range(prompts)), "utf-8")
    (folder / "config.toml").write_text(
        f'[model]\npretrained_model_name_or_path = "{folder}/model"\n'
        f'[data]\nname = "none"\ninstance_data_root = "{folder}"\n'
        f'[precompute]\ncache = "{folder}/cache"\n'
        f'[train]\noutput_dir = "{folder}/run"\n'
        f'[sample]\noutput_dir = "{folder}/samples"\nprompts_file = "{folder}/prompts.txt"\n'
        f"num_frames = 9\nheight = 64\nwidth = 96\nnum_inference_steps = {steps}\n",
        "utf-8",
    )
    return ["sample", str(folder / "config.toml")]


def test_a_stop_keeps_what_is_done(tmp_path: Path) -> None:
    command, samples = write_config(tmp_path, prompts=2, steps=10), tmp_path / "samples"
    child = fork_command(command, tmp_path / "errors.txt")
    wait_until(lambda: list(samples.glob("*.json")))
    os.kill(child, signal.SIGINT)
    _, status = os.waitpid(child, 0)
    said = (tmp_path / "errors.txt").read_text("utf-8")
    assert os.waitstatus_to_exitcode(status) == 75, said
    assert "finished videos are kept; the same command goes on from here" in said and "Traceback" not in said
    kept = len(list(samples.glob("*.json")))
    assert 0 < kept < 4 and not list(samples.glob(".tmp*"))
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.stderr
    made = json.loads(result.stdout)
    assert len(made["videos"]) == 4 and made["made"] == 4 - kept


@pytest.mark.faults  # two processes that import everything
def test_processes_share_the_prompts(tmp_path: Path) -> None:
    command = write_config(tmp_path, prompts=3, steps=1)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "precog"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launcher, *command, "--json"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert len(made["videos"]) == 6 and made["made"] == 4  # of rank 0, which has two of the three prompts
    assert (tmp_path / "samples" / "sheet.png").exists()
    assert CliRunner().invoke(app, command).exit_code == 0

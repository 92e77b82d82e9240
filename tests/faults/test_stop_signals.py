"""SIGTERM in the first seconds of every command: 75, or 143 before Python has its handlers, and never a traceback."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared.config import Sampling
from shared.config_file import save_config
from shared.signals import StopSignal
from tests.experiments import fill_cache, write_experiment
from train.loop import train

pytestmark = pytest.mark.faults
ROUNDS, SECONDS = 20, 8.0
SAMPLING = Sampling(prompts=("a bird",), num_frames=9, height=64, width=96, num_inference_steps=5)
COMMANDS = (
    "precompute {config} precompute.cache={new}",
    "plan {config}",
    "train {config} train.max_train_steps=1000 train.output_dir={new}",
    "sample {config} sample.num_inference_steps=200 sample.output_dir={new}",
    "decode {config} sample.output_dir={new}",
    "cache verify {cache}",
    "cache gc {cache} --min-age-hours 0",
    "cache push {new} {cache}",
    "cache pull {cache} {new}",
)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a config, its cache, and a run with a preview."""
    folder = tmp_path_factory.mktemp("signals")
    config = write_experiment("2b", folder, max_train_steps=1, preview_steps=1, lora_rank=4)
    config = config.model_copy(update={"sample": SAMPLING})
    fill_cache(config)
    train(config, StopSignal())
    save_config(config, folder / "config.toml")
    return folder


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.partition(" {")[0])
def test_early_sigterm_ends_with_75_or_143(command: str, experiment: Path, tmp_path: Path) -> None:
    draws, ends = random.Random(command), list[int]()
    for number in range(ROUNDS):
        places = {"config": experiment / "config.toml", "cache": experiment / "cache", "new": tmp_path / str(number)}
        arguments = [word.format(**places) for word in command.split()]
        with subprocess.Popen(
            [sys.executable, "-m", "precog", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as child:
            try:
                output, _ = child.communicate(timeout=SECONDS * draws.random())
            except subprocess.TimeoutExpired:
                child.terminate()
                output, _ = child.communicate(timeout=120)
        ends.append(child.returncode)
        assert child.returncode in (0, 75, -signal.SIGTERM), output
        assert "Traceback" not in output and "Exception ignored" not in output, output
    assert ends.count(75) + ends.count(-signal.SIGTERM) >= ROUNDS // 4, ends

"""Another number of processes changes only the rounding: the same clips, noise and timesteps, in one order."""

import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shared.cache.storage import LocalStorage
from shared.cache.view import read_view, write_view
from shared.config import Config
from shared.config_file import save_config
from shared.run_folder import read_metrics
from tests.experiments import changed
from tests.train import processes
from train.checkpoint.files import load_checkpoint

Settings = Callable[..., Config]
LOSS_TOLERANCE = 1e-6
NUM_STEPS = 12
VALUES: dict[str, Any] = {
    "max_train_steps": NUM_STEPS,
    "global_batch_size": 5,
    "checkpointing_steps": 1,
    "max_tokens_per_pack": 100,
    "learning_rate": 1e-3,
    "max_grad_norm": 1e-3,
    "caption_dropout": 0.2,
    "timestep_sampling": "stratified",
    "log_clips": True,
}


@pytest.fixture(scope="module")
def straight(experiment: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Return the run in one process, of a view whose first row comes three times, at half weight."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    cache = folder.with_name("cache")  # the other tests' views stay as they are
    shutil.copytree(experiment.precompute.cache, cache)
    storage = LocalStorage(str(cache))
    view = read_view(storage, experiment.data.name)
    first = replace(view.split("train")[0], repeats=3, loss_weight=0.5)
    rows = tuple(first if row.latent_key == first.latent_key else row for row in view.rows)
    write_view(storage, replace(view, name="weighted", rows=rows))
    places: dict[str, Any] = {"data": {"name": "weighted"}, "precompute": {"cache": str(cache)}}
    config = changed(experiment, train=VALUES | {"output_dir": folder}, **places)
    assert processes.run(config) == [0], processes.log(config)
    return config


def assert_same_run(config: Config, straight: Config) -> None:
    lines, expected = (read_metrics(run.train.output_dir) for run in (config, straight))
    for name in ("step", "clips", "timesteps", "tokens", "samples", "lr"):
        assert [line[name] for line in lines] == [line[name] for line in expected], name
    for line, other in zip(lines, expected, strict=True):
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert line["grad_norm"] > VALUES["max_grad_norm"], "so that clipping acts"
    losses = [(line["loss"], other["loss"]) for line, other in zip(lines, expected, strict=True)]
    assert max(abs(ours - theirs) for ours, theirs in losses) <= LOSS_TOLERANCE
    left, right = (
        load_file(run.train.output_dir / "export" / "pytorch_lora_weights.safetensors") for run in (config, straight)
    )
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=0, atol=1e-4)


def test_one_two_four_and_one_processes_make_one_run(straight: Config, settings: Settings) -> None:
    config = settings(**VALUES).model_copy(update={"data": straight.data, "precompute": straight.precompute})
    assert processes.run(config, world_size=2, killed_after_step=4)[0] == -signal.SIGKILL
    assert load_checkpoint(config.train.output_dir / "checkpoint-000004").step == 4
    assert processes.run(config, world_size=4, killed_after_step=8)[0] == -signal.SIGKILL
    assert load_checkpoint(config.train.output_dir / "checkpoint-000008").step == 8
    assert processes.run(config) == [0], processes.log(config)
    assert_same_run(config, straight)
    seen = Counter(clip for line in read_metrics(config.train.output_dir) for clip in line["clips"])
    *others, often = sorted(seen.values())
    assert len(others) == 6 and set(others) <= {6, 7} and 18 <= often <= 21, "six epochs of nine places, and six draws"


def test_two_processes_repeat_themselves_bit_for_bit(settings: Settings) -> None:
    """Straight, and killed and resumed, with more processes than clips in the last pack."""
    for name, killed_after_step in (("straight", None), ("parts", 2)):
        config = settings(name, **VALUES | {"max_train_steps": 5})
        if killed_after_step is not None:
            processes.run(config, world_size=2, killed_after_step=killed_after_step)
        assert processes.run(config, world_size=2) == [0, 0], processes.log(config)
    left, right = (
        load_checkpoint(settings(name).train.output_dir / "checkpoint-000005") for name in ("straight", "parts")
    )
    for file in left.tensors:
        assert all(torch.equal(tensor, right.tensors[file][name]) for name, tensor in left.tensors[file].items())


def test_a_signal_to_one_rank_stops_all_at_the_same_step(settings: Settings) -> None:
    config = settings(**VALUES | {"max_train_steps": 20_000, "checkpointing_steps": 20_000, "nccl_timeout": 20})
    children = processes.start(config, world_size=2)
    processes.wait_until(lambda: len(read_metrics(config.train.output_dir)) >= 2)
    assert children[1].pid is not None
    os.kill(children[1].pid, signal.SIGTERM)
    assert processes.finish(children, others_follow=False) == [75, 75], processes.log(config)
    done = len(read_metrics(config.train.output_dir))
    assert load_checkpoint(config.train.output_dir / f"checkpoint-{done:06}").step == done


@pytest.mark.faults
def test_the_launcher_of_torch_makes_the_same_run(settings: Settings, tmp_path: Path) -> None:
    """`torchrun --nproc-per-node 2 -m precog train`, SIGTERM to the launcher, and the rest in one process."""
    values = VALUES | {"max_train_steps": 20_000, "checkpointing_steps": 20_000}
    save_config(settings(**values), tmp_path / "config.toml")
    folder = settings().train.output_dir
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launcher = subprocess.Popen([*torchrun, "-m", "precog", "train", str(tmp_path / "config.toml")], env=environment)
    processes.wait_until(lambda: len(read_metrics(folder)) >= 3)
    launcher.terminate()
    launcher.wait(60)
    done = len(read_metrics(folder))
    assert load_checkpoint(folder / f"checkpoint-{done:06}").step == done
    values |= {"max_train_steps": done + 2}
    onwards, straight = settings(**values), settings("straight", **values)
    assert processes.run(onwards) == [0], processes.log(onwards)
    assert processes.run(straight) == [0]
    assert_same_run(onwards, straight)

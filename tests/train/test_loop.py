"""Interrupted runs in real processes: SIGKILL, SIGTERM, loss that is not finite, damaged samples, two processes."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shared.cache.storage import open_storage
from shared.cache.verify import verify
from shared.config import Config
from shared.errors import Preempted
from shared.run_folder import read_metrics
from shared.signals import StopSignal
from tests.experiments import changed
from tests.train import processes
from tests.train.saved import damaged
from train.checkpoint.files import load_checkpoint, save_checkpoint
from train.loop import train

Settings = Callable[..., Config]
NUM_STEPS = 12
VALUES: dict[str, Any] = {
    "max_train_steps": NUM_STEPS,
    "checkpointing_steps": 1,
    "validation_steps": 4,
    "lora_dropout": 0.3,
    "caption_dropout": 0.2,
    "lr_scheduler": "cosine",
    "timestep_sampling": "stratified",
    "log_clips": True,
}
VARYING = ("seconds", "data_wait_seconds", "peak_memory_bytes")


@pytest.fixture(scope="module")
def straight(experiment: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Return the uninterrupted run."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    config = changed(experiment, train=VALUES | {"output_dir": folder})
    assert processes.run(config) == [0], processes.log(config)
    return config


def same_run(left: Config, right: Config) -> bool:
    """Losses, gradient norms, clips, timesteps, held-out losses, weights and optimizer state, to the last bit."""
    lines, folders = [], [left.train.output_dir, right.train.output_dir]
    for folder in folders:
        kept = [{name: line[name] for name in line if name not in VARYING} for line in read_metrics(folder)]
        lines.append([json.dumps(line) for line in kept])
        assert [line["step"] for line in kept] == list(range(1, NUM_STEPS + 1))
    saved = [load_checkpoint(folder / f"checkpoint-{NUM_STEPS:06}").tensors for folder in folders]
    exports = [{"export": load_file(folder / "export" / "pytorch_lora_weights.safetensors")} for folder in folders]
    for first, second in (saved, exports):
        assert first.keys() == second.keys()
        for file in first:
            assert first[file].keys() == second[file].keys()
            assert all(torch.equal(first[file][name], second[file][name]) for name in first[file]), file
    return lines[0] == lines[1]


def test_a_killed_and_resumed_run_repeats_the_straight_run(straight: Config, settings: Settings) -> None:
    config = settings(**VALUES)
    assert processes.run(config, killed_after_step=5) == [-signal.SIGKILL]
    assert read_metrics(config.train.output_dir)[-1]["step"] == 5
    assert processes.run(config) == [0], processes.log(config)
    assert same_run(config, straight)


def kill_once(config: Config, *, in_a_save: bool, delay_seconds: float) -> None:
    begun = len(_lines(config))
    (child,) = processes.start(config)
    if in_a_save:
        processes.wait_until(lambda: bool(_unfinished(config)) or not child.is_alive())
    else:
        processes.wait_until(lambda: len(_lines(config)) > begun or not child.is_alive())
        time.sleep(delay_seconds)
    child.kill()
    assert processes.finish([child]) in ([-signal.SIGKILL], [0])


def _lines(config: Config) -> list[str]:
    path = config.train.output_dir / "metrics.jsonl"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _unfinished(config: Config) -> list[Path]:
    return list(config.train.output_dir.glob(".tmp-*/*"))


@pytest.mark.faults
def test_ten_kills_some_inside_a_save_leave_no_trace(straight: Config, settings: Settings) -> None:
    config, draw, inside = settings(**VALUES), random.Random(0), 0
    for number in range(10):
        kill_once(config, in_a_save=bool(number % 2), delay_seconds=draw.random() * 0.05)
        inside += bool(_unfinished(config))
    assert processes.run(config) == [0], processes.log(config)
    assert same_run(config, straight)
    assert inside, "no kill fell inside a save"


def test_a_signal_saves_and_exits_75(straight: Config, settings: Settings) -> None:
    config = settings(**VALUES | {"checkpointing_steps": 100})
    (child,) = processes.start(config)
    processes.wait_until(lambda: len(_lines(config)) >= 2)
    child.terminate()
    assert processes.finish([child]) == [75]
    done = len(_lines(config))
    assert load_checkpoint(config.train.output_dir / f"checkpoint-{done:06}").step == done
    assert "the same command resumes" in processes.log(config)
    assert processes.run(config) == [0]
    assert f"resuming from {config.train.output_dir}/checkpoint-{done:06}" in processes.log(config)
    assert same_run(config, straight)


def test_a_signal_while_the_run_opens_ends_it_before_a_step(settings: Settings) -> None:
    with StopSignal() as stop, pytest.raises(Preempted, match="before the first step; the same command starts again"):
        signal.raise_signal(signal.SIGTERM)
        train(settings(), stop)
    assert not list(settings().train.output_dir.glob("checkpoint-*"))


def test_config_and_metrics_are_durable_before_a_checkpoint(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").readlink().name))
    train(settings(max_train_steps=1), StopSignal())
    assert synced.index(".tmp-config.toml") < synced.index("metrics.jsonl") < synced.index("COMMIT.json")


def test_two_processes_do_not_train_in_one_folder(settings: Settings) -> None:
    config = settings(**VALUES | {"max_train_steps": 100_000, "checkpointing_steps": 100_000, "validation_steps": 0})
    (child,) = processes.start(config)
    try:
        processes.wait_until(lambda: len(_lines(config)) >= 1)
        assert processes.run(config) == [2]
        assert "another process is training in this folder" in processes.log(config)
    finally:
        child.kill()
        child.join()


def test_a_loss_that_is_not_finite_exits_5_before_the_update(settings: Settings) -> None:
    config = settings("first", max_train_steps=2, checkpointing_steps=1)
    train(config, StopSignal())
    checkpoint = load_checkpoint(config.train.output_dir / "checkpoint-000002")
    # An adapter whose product overflows float32 where the next clips meet it.
    huge = {name: torch.full_like(tensor, 1e30) for name, tensor in checkpoint.tensors["adapter"].items()}
    save_checkpoint(config.train.output_dir, 2, checkpoint.tensors | {"adapter": huge}, checkpoint.state)
    before = sorted(path.name for path in config.train.output_dir.glob("checkpoint-*"))
    onwards = settings("first", max_train_steps=4, checkpointing_steps=1)
    assert processes.run(onwards) == [5]
    assert "not finite: loss of videos/" in processes.log(onwards)
    assert "this step was not applied" in processes.log(onwards)
    assert sorted(path.name for path in config.train.output_dir.glob("checkpoint-*")) == before
    assert [line["step"] for line in read_metrics(config.train.output_dir)] == [1, 2]


def test_a_save_that_fails_ends_every_rank(settings: Settings) -> None:
    config = settings(max_train_steps=4, checkpointing_steps=2)
    codes = processes.finish(processes.start(config, world_size=2, largest_file_bytes=8_000), others_follow=False)
    assert codes == [1, 1]
    assert "checkpoint-000002: cannot be saved (File too large)" in processes.log(config)
    line = processes.log(config, rank=1).splitlines()[-1]
    assert line.startswith("precog: rank 0: ") and "checkpoint-000002: cannot be saved (File too large)" in line
    assert not list(config.train.output_dir.glob("checkpoint-*"))


def test_a_flipped_bit_exits_4_before_its_step(settings: Settings, tmp_path: Path) -> None:
    config, row, tar = damaged(settings(max_train_steps=8, log_clips=True), tmp_path, "train", 3)
    assert processes.run(config) == [4]
    last = processes.log(config).splitlines()[-1]
    assert last.startswith(f"precog: {row.source} at 0.00 s: {tar}: sample {row.latent_key} is damaged; "), last
    assert "`precog cache verify --repair`" in last
    assert all(row.latent_key not in line["clips"] for line in read_metrics(config.train.output_dir))
    assert verify(open_storage(config.precompute.cache), repair=True)[1] == [
        f"{tar}: sample {row.latent_key} is damaged"
    ]

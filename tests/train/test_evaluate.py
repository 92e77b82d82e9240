"""The held-out loss: taken after the checkpoint, divided over the processes, the same for any number of them."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from precompute.run import precompute
from shared.config import Config
from shared.errors import Preempted
from shared.run_folder import EXPORT, adapter_file, read_metrics
from shared.signals import StopSignal
from tests.experiments import changed
from tests.train import processes
from tests.train.saved import damaged
from train.checkpoint.files import load_checkpoint
from train.evaluate import held_out_loss
from train.loop import train
from train.open_run import open_run

VARYING = ("seconds", "data_wait_seconds", "peak_memory_bytes")
Held = Callable[..., Config]


@pytest.fixture(scope="module")
def three_held_out(experiment: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Five clips to train on, three held out, in a cache of its own."""
    folder = tmp_path_factory.mktemp("three_held_out")
    config = changed(experiment, data={"held_out_clips": 3}, precompute={"cache": str(folder / "cache")})
    precompute(config)
    return config


@pytest.fixture
def held(three_held_out: Config, tmp_path: Path) -> Held:
    def change(name: str = "run", **values: Any) -> Config:
        values = {"output_dir": tmp_path / name, "global_batch_size": 1} | values
        return changed(three_held_out, train=values)

    return change


def losses(config: Config) -> list[dict[str, Any]]:
    lines = read_metrics(config.train.output_dir)
    return [{name: line[name] for name in line if name not in VARYING} for line in lines]


def test_the_held_out_loss_is_the_same_on_any_number_of_ranks(held: Held) -> None:
    """Bit for bit with fewer clips than ranks; a batch of one clip makes the weights equal too."""
    alone, together = (held(name, max_train_steps=2, validation_steps=1) for name in ("alone", "together"))
    train(alone, StopSignal())
    assert processes.run(together, 4) == [0] * 4, processes.log(together)
    assert losses(together) == losses(alone)
    assert [line["held_out_loss"] != line["loss"] for line in losses(alone)] == [True, True]


def test_the_lowest_held_out_loss_is_exported_and_a_run_without_gain_ends(held: Held) -> None:
    values = {"validation_steps": 1, "checkpointing_steps": 1, "checkpoints_total_limit": 30, "learning_rate": 1.0}
    train(held(max_train_steps=1, **values), StopSignal())
    config = held(max_train_steps=30, stop_after_evaluations_without_gain=1, **values)
    train(config, StopSignal())
    folder, lines = config.train.output_dir, losses(config)
    for line in lines:
        cells = [loss for clip in line["held_out_cells"] for loss in clip]
        assert (len(line["held_out_cells"]), len(cells)) == (3, 15)
        assert sum(cells) / 15 == line["held_out_loss"], "bit for bit"
    bases = [loss for clip in lines[0]["base_held_out_cells"] for loss in clip]
    assert sum(bases) / 15 == lines[0]["base_held_out_loss"]
    assert (len(lines[0]["held_out_clips"]), lines[0]["timestep_quantiles"]) == (3, [0.1, 0.3, 0.5, 0.7, 0.9])
    assert [line["step"] for line in lines if "held_out_clips" in line] == [1]
    best = min(lines, key=lambda line: line["held_out_loss"])["step"]
    assert [line["step"] for line in lines] == list(range(1, best + 2)), "one evaluation later"
    for place, step in (("export", best + 1), ("export/best", best)):
        trained = load_checkpoint(folder / f"checkpoint-{step:06}").tensors["adapter"]
        exported = load_file(adapter_file(folder / place))
        assert exported.keys() == {f"transformer.{name}" for name in trained}
        assert all(torch.equal(exported[f"transformer.{name}"], tensor) for name, tensor in trained.items())
    before = (folder / "metrics.jsonl").read_bytes()
    shutil.rmtree(folder / EXPORT)
    train(config, StopSignal())
    assert (folder / "metrics.jsonl").read_bytes() == before, "a run that has ended takes no more steps"


def test_the_held_out_loss_is_without_dropout(held: Held) -> None:
    found = []
    for lora_dropout in (0.0, 0.5):
        run = open_run(held(lora_dropout=lora_dropout))
        generator = torch.Generator().manual_seed(0)
        for _, parameter in run.parameters:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        found.append(held_out_loss(run, stopped=lambda: False))
        assert run.transformer.training
    assert found[0] is not None and found[0] == found[1]


def test_a_damaged_clip_ends_all_ranks_with_one_line(held: Held, tmp_path: Path) -> None:
    config, row, _ = damaged(held(max_train_steps=1), tmp_path, "held_out", 1)
    assert processes.finish(processes.start(config, 2), others_follow=False) == [4, 4]
    for rank in range(2):
        assert processes.log(config, rank).splitlines()[-1].startswith(f"precog: rank 1: {row.source} at 0.00 s: ")
    assert load_checkpoint(config.train.output_dir / "checkpoint-000001").step == 1, "saved before"


@pytest.mark.parametrize(("step", "poll"), [(2, 5), (4, 1)])
def test_a_signal_in_an_evaluation_stops_after_a_clip(step: int, poll: int, held: Held) -> None:
    values = {"max_train_steps": 4, "validation_steps": 2, "checkpointing_steps": 3}
    straight, config = held("straight", **values), held(**values)
    train(straight, StopSignal())
    with pytest.raises(Preempted, match=f"checkpoint saved at step {step} of 4"):
        train(config, processes.StopAt(config.train.output_dir, step, poll))
    assert [line["step"] for line in losses(config) if "held_out_loss" in line] == [2][: step // 4]
    train(config, StopSignal())
    assert losses(config) == losses(straight)
    left, right = (load_file(adapter_file(run.train.output_dir / EXPORT)) for run in (straight, config))
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.faults  # it waits for the timeout
@pytest.mark.parametrize(("number", "least"), [(signal.SIGSTOP, 2), (signal.SIGKILL, 0)])
def test_a_process_ends_with_one_line_when_another_hangs_or_dies(held: Held, number: int, least: int) -> None:
    config = held(max_train_steps=100_000, checkpointing_steps=100_000, nccl_timeout=3)
    children = processes.start(config, 2)
    try:
        processes.wait_until(lambda: len(read_metrics(config.train.output_dir)) >= 2)
        assert children[1].pid is not None
        os.kill(children[1].pid, number)
        stopped = time.monotonic()
        children[0].join(60)
        assert children[0].exitcode == 1
        (line,) = (line for line in processes.log(config).splitlines() if "precog: " in line)
        assert line.startswith("precog: another process of this run ended or does not answer; ")
        assert "Traceback" not in processes.log(config)
        assert least < time.monotonic() - stopped < 30
    finally:
        for child in children:
            child.kill()
            child.join()

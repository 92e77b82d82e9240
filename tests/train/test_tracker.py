"""The trackers get the metrics of every step while training."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.config import Config, Sampling
from shared.errors import UsageError
from shared.run_folder import read_metrics, wandb_options
from shared.signals import StopSignal
from tests import experiments
from train.loop import train

SAMPLE = Sampling(num_frames=9, height=experiments.HEIGHT, width=experiments.WIDTH, num_inference_steps=2)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """One clip to train on, one held out, two prompts."""
    config = experiments.write_experiment("2b", tmp_path_factory.mktemp("tracker"), lora_rank=4)
    values = {"held_out_clips": 1, "validation_prompts": experiments.CAPTIONS}
    config = experiments.changed(config, data=values).model_copy(update={"sample": SAMPLE})
    experiments.fill_cache(config)
    return config


def changed(config: Config, folder: Path, **values: Any) -> Config:
    fields = {"output_dir": folder, "tracker_name": "rabbits", "max_train_steps": 4, "checkpointing_steps": 2} | values
    return experiments.changed(config, train={"preview_steps": 2, "validation_steps": 2, **fields})


@pytest.fixture
def quiet() -> Iterator[None]:
    """Ignore the deprecation warnings of the trackers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_tensorboard_shows_metrics_and_previews_under_the_projects_name(
    cached: Config, tmp_path: Path, quiet: None
) -> None:
    pytest.importorskip("tensorboard")
    config = changed(cached, tmp_path / "run", report_to="tensorboard")
    train(config, StopSignal())
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(config.train.output_dir / "rabbits"))
    events.Reload()
    lines = read_metrics(config.train.output_dir)
    for name in ("loss", "ema_loss", "held_out_loss", "base_held_out_loss"):
        written = [(event.step, event.value) for event in events.Scalars(name)]
        assert written == [(line["step"], pytest.approx(line[name])) for line in lines if name in line] != []
    assert [image.step for image in events.Images("previews/00")] == [2, 4]


@pytest.fixture
def wandb(quiet: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """wandb as a fresh process has it: it reads the environment once."""
    module = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    module.teardown()
    yield monkeypatch
    module.teardown()


@pytest.mark.faults  # it starts wandb's own process
def test_wandb_keeps_metrics_and_previews_offline_as_one_run(
    cached: Config, tmp_path: Path, wandb: pytest.MonkeyPatch
) -> None:
    wandb.setenv("WANDB_MODE", "offline")
    config = changed(cached, tmp_path / "run", report_to="wandb")
    train(config, StopSignal())
    pytest.importorskip("wandb").teardown()  # its process writes when it likes, and has written all when it has ended
    [folder] = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert folder.name.rpartition("-")[2] == wandb_options(config.train)["id"]
    content = next(folder.glob("*.wandb")).read_bytes()
    assert all(word in content for word in (b"rabbits", b"ema_loss", b"base_held_out_loss", b"held_out_loss_at_0.5"))


def test_a_tracker_that_is_not_installed_is_refused_in_one_line(
    cached: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.errors.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"'wandb': package wandb not found; run `pip install -e '\.\[wandb\]'`"):
        train(changed(cached, tmp_path / "run", report_to="wandb"), StopSignal())


@pytest.mark.faults  # it starts wandb's own process
def test_wandb_without_a_login_is_refused_before_the_first_step(
    cached: Config, tmp_path: Path, wandb: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        wandb.delenv(name, raising=False)
    wandb.setenv("HOME", str(tmp_path))
    config = changed(cached, tmp_path / "run", report_to="wandb")
    with pytest.raises(UsageError, match=r"report_to = 'wandb': No API key .*; run `wandb login` or set"):
        train(config, StopSignal())
    assert not read_metrics(config.train.output_dir)

"""Options of [train] change what they name, or are refused with a reason."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from pydantic import ValidationError
from safetensors.torch import load_file

from shared.cache.storage import LocalStorage
from shared.cache.view import read_view, write_view
from shared.config import Config, Train
from shared.errors import DataError, UsageError
from shared.run_folder import read_metrics
from shared.signals import StopSignal
from tests.experiments import changed
from train.evaluate import held_out_loss
from train.loop import train
from train.open_run import open_run

Settings = Callable[..., Config]
Weights = dict[str, torch.Tensor]


def export(config: Config) -> Weights:
    """Train unless the run is finished; return the exported weights."""
    path = config.train.output_dir / "export" / "pytorch_lora_weights.safetensors"
    if not path.exists():
        train(config, StopSignal())
    return load_file(path)


def equal(left: Weights, right: Weights) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def plain(experiment: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Train the experiment as it is."""
    config = changed(experiment, train={"output_dir": tmp_path_factory.mktemp("plain") / "run"})
    train(config, StopSignal())
    return config


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("lora_dropout", 0.5),
        ("lora_target_modules", ("to_q", "ff.net.0.proj")),
        ("max_grad_norm", 1e-3),
        ("mixed_precision", "bf16"),
        ("seed", 43),
    ],
)
def test_the_option_changes_the_trained_weights(field: str, other: Any, settings: Settings, plain: Config) -> None:
    assert not equal(export(settings(**{field: other})), export(plain))


@pytest.mark.parametrize("kind", ["use_rslora", "use_dora"])
def test_the_export_does_in_diffusers_what_was_trained(kind: str, settings: Settings) -> None:
    config = settings(**{kind: True}, learning_rate=0.1)
    train(config, StopSignal())
    line = read_metrics(config.train.output_dir)[-1]
    pipeline = CogVideoXPipeline.from_pretrained(config.model.pretrained_model_name_or_path)
    pipeline.load_lora_weights(str(config.train.output_dir / "export"))
    assert line["held_out_loss"] == pytest.approx(loss_of(pipeline.transformer, config), rel=1e-6)
    pipeline.unload_lora_weights()
    assert line["base_held_out_loss"] == pytest.approx(loss_of(pipeline.transformer, config), rel=1e-6)
    assert abs(line["base_held_out_loss"] - line["held_out_loss"]) > 1e-4


def loss_of(transformer: CogVideoXTransformer3DModel, config: Config) -> float:
    """Return the held-out loss of any transformer."""
    found = held_out_loss(replace(open_run(config), transformer=transformer), stopped=lambda: False)
    assert found is not None
    return found[0]


def test_a_view_without_training_clips_is_refused(settings: Settings) -> None:
    config = settings()
    storage = LocalStorage(config.precompute.cache)
    view = read_view(storage, config.data.name)
    rows = tuple(replace(row, split="held_out") for row in view.rows)
    write_view(storage, replace(view, name="held out", rows=rows))
    config = changed(config, data={"name": "held out"})
    with pytest.raises(DataError, match="the view has no training clips; check its skipped clips"):
        open_run(config)


def test_a_target_that_names_no_layer_is_refused(settings: Settings) -> None:
    with pytest.raises(UsageError, match="the transformer has no layer nonsense"):
        open_run(settings(lora_target_modules=("to_q", "nonsense")))


def test_a_run_begins_at_its_initial_adapter(settings: Settings, plain: Config) -> None:
    onwards = open_run(settings(initial_adapter=plain.train.output_dir / "export"))
    first = load_file(plain.train.output_dir / "export" / "pytorch_lora_weights.safetensors")
    for name, value in onwards.parameters:
        assert torch.equal(value, first[f"transformer.{name.replace('.default', '')}"])


def test_packs_hold_as_many_clips_as_tokens_allow(settings: Settings, plain: Config) -> None:
    config = settings(max_tokens_per_pack=10_000)
    weights = export(config)
    assert [line["packs"] for line in read_metrics(config.train.output_dir)] == [1, 1, 1]
    for name, tensor in export(plain).items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-2, atol=1e-4)


def test_deterministic_and_tf32_are_torchs_switches(settings: Settings) -> None:
    assert not torch.backends.cuda.matmul.allow_tf32
    try:
        open_run(settings(deterministic=True, allow_tf32=True))
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.matmul.allow_tf32 = False


def test_checkpoints_held_out_losses_and_clips_come_as_asked(settings: Settings, plain: Config) -> None:
    config = settings(max_train_steps=5, checkpointing_steps=2, validation_steps=2, log_clips=True)
    train(config, StopSignal())
    lines = read_metrics(config.train.output_dir)
    assert sorted(path.name for path in config.train.output_dir.glob("checkpoint-*")) == [
        "checkpoint-000004",
        "checkpoint-000005",
    ]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [2, 4, 5]
    assert [line["step"] for line in lines if "base_held_out_loss" in line] == [2]
    assert all(len(line["clips"]) == len(line["timesteps"]) == 2 for line in lines)
    silent = read_metrics(plain.train.output_dir)
    assert [line["step"] for line in silent if "held_out_loss" in line] == [3]
    assert [line["loss"] for line in silent] == [line["loss"] for line in lines[:3]], "evaluation changes no step"
    assert all("clips" not in line for line in silent)


def test_a_run_that_ends_before_its_checkpoint_is_refused(settings: Settings, plain: Config) -> None:
    folder = plain.train.output_dir
    saved = (folder / "config.toml").read_bytes()
    with pytest.raises(UsageError, match=r"checkpoint-000003 is beyond the run's 2 steps; raise max_train_steps"):
        train(settings(max_train_steps=2, output_dir=folder), StopSignal())
    assert (folder / "config.toml").read_bytes() == saved


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"prodigy_decouple": True}, "prodigy_decouple needs optimizer = 'prodigy'"),
        ({"prodigy_beta3": 0.0}, "prodigy_beta3 needs"),
        ({"device": "tpu9"}, "'auto', 'cpu' or 'cuda'"),
    ],
)
def test_contradictory_and_unknown_options_are_refused(values: dict[str, Any], line: str) -> None:
    with pytest.raises(ValidationError, match=line):
        Train(output_dir=Path("unused"), **values)

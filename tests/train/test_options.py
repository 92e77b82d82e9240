"""Every option of [train] changes something that can be seen, or is refused with a reason."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from pydantic import ValidationError
from safetensors.torch import load_file

from shared.config import Config, Train
from shared.errors import UsageError
from shared.run_folder import read_metrics
from shared.signals import StopSignal
from tests.train.fields import FIELDS
from train.checkpoint.files import load_checkpoint
from train.evaluate import held_out_loss
from train.loop import train
from train.open_run import open_run

Settings = Callable[..., Config]
EXTRAS = {"prodigy": "prodigyopt", "adamw8bit": "bitsandbytes"}

# Fields that change the trained weights: the settings they matter under, and another value.
WEIGHTS: dict[str, tuple[dict[str, Any], Any]] = {
    "lora_rank": ({}, 8),
    "lora_alpha": ({}, 2),
    "lora_dropout": ({}, 0.5),
    "lora_target_modules": ({}, ("to_q", "ff.net.0.proj")),
    "use_rslora": ({}, True),
    "use_dora": ({}, True),
    "ema_decay": ({}, 0.9),
    "max_grad_norm": ({}, 1e-3),
    "global_batch_size": ({}, 3),
    "max_train_steps": ({}, 2),
    "num_train_epochs": ({"max_train_steps": None, "global_batch_size": 7}, 2),
    "mixed_precision": ({}, "bf16"),
    "timestep_sampling": ({}, "stratified"),
    "snr_gamma": ({}, 1.0),
    "caption_dropout": ({}, 1.0),
    "seed": ({}, 43),
}


def test_every_option_is_tested() -> None:
    text = "".join(path.read_text("utf-8") for path in Path(__file__).parent.rglob("*.py"))
    tested = {name for name in Train.model_fields if f'"{name}"' in text or f"{name}=" in text}
    assert WEIGHTS.keys() | FIELDS.keys() | tested == Train.model_fields.keys()


def export(config: Config) -> dict[str, torch.Tensor]:
    path = config.train.output_dir / "export" / "pytorch_lora_weights.safetensors"
    if not path.exists():
        train(config, StopSignal())
    return load_file(path)


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def resumed(config: Config, step: int) -> dict[str, torch.Tensor]:
    """Train to the end, take away what came after `step`, and train again from there; the export."""
    train(config, StopSignal())
    folder = config.train.output_dir
    shutil.rmtree(folder / "export")
    for path in folder.glob("checkpoint-*"):
        if int(path.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(path)
    return export(config)


@pytest.fixture(scope="module")
def plain(experiment: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Return the export of the experiment as it is."""
    folder = tmp_path_factory.mktemp("plain")
    return export(
        experiment.model_copy(update={"train": experiment.train.model_copy(update={"output_dir": folder / "run"})})
    )


@pytest.mark.parametrize("field", WEIGHTS)
def test_the_option_changes_the_trained_weights(field: str, settings: Settings, plain: dict[str, torch.Tensor]) -> None:
    context, other = WEIGHTS[field]
    without = export(settings("without", **context)) if context else plain
    assert not equal(export(settings("with", **context, **{field: other})), without)


@pytest.mark.parametrize("kind", [{}, {"use_rslora": True}, {"use_dora": True}, {"ema_decay": 0.5}])
def test_the_export_does_in_diffusers_what_was_trained(kind: dict[str, Any], settings: Settings) -> None:
    config = settings(**kind, lora_dropout=0.0, learning_rate=0.1)
    train(config, StopSignal())
    held_out = read_metrics(config.train.output_dir)[-1]["held_out_loss"]

    pipeline = CogVideoXPipeline.from_pretrained(config.model.pretrained_model_name_or_path)
    pipeline.load_lora_weights(str(config.train.output_dir / "export"))
    assert held_out == pytest.approx(loss_of(pipeline.transformer, config), rel=1e-6)
    pipeline.unload_lora_weights()
    base = read_metrics(config.train.output_dir)[-1]["base_held_out_loss"]
    assert base == pytest.approx(loss_of(pipeline.transformer, config), rel=1e-6)
    assert abs(base - held_out) > 1e-4


def loss_of(transformer: CogVideoXTransformer3DModel, config: Config) -> float:
    """Return the held-out loss of any transformer."""
    found = held_out_loss(replace(open_run(config), transformer=transformer), stopped=lambda: False)
    assert found is not None
    return found[0]


def test_a_target_that_names_no_layer_is_refused(settings: Settings) -> None:
    with pytest.raises(UsageError, match="the transformer has no layer nonsense"):
        train(settings(lora_target_modules=("to_q", "nonsense")), StopSignal())


def test_a_run_begins_at_its_initial_adapter(settings: Settings) -> None:
    first = export(settings("first"))
    path = settings("first").train.output_dir / "export"
    onwards = settings("onwards", initial_adapter=path, learning_rate=1e-12, adam_weight_decay=0)
    for name, tensor in export(onwards).items():
        torch.testing.assert_close(tensor, first[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"lora_rank": 8}, r"expected lora_rank 8, got 4; set train\.lora_rank=4"),
        ({"lora_alpha": 1}, "expected lora_alpha 1.0, got 8.0"),
        ({"use_rslora": True}, "expected use_rslora True, got False"),
        ({"lora_target_modules": ("to_q",)}, r"expected .* of shape None, got"),
        ({"initial_adapter": Path("nowhere")}, "cannot be read"),
    ],
)
def test_an_initial_adapter_of_another_kind_is_refused(change: Any, line: str, settings: Settings) -> None:
    export(settings("first"))
    values = {"initial_adapter": settings("first").train.output_dir / "export"} | change
    with pytest.raises(UsageError, match=line):
        train(settings("onwards", **values), StopSignal())


def test_packs_hold_as_many_clips_as_tokens_allow(settings: Settings, plain: dict[str, torch.Tensor]) -> None:
    config = settings(max_tokens_per_pack=10_000)
    weights = export(config)
    assert [line["packs"] for line in read_metrics(config.train.output_dir)] == [1, 1, 1]
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-2, atol=1e-4)


def test_deterministic_is_torchs_switch(settings: Settings) -> None:
    try:
        train(settings(deterministic=True, max_train_steps=1), StopSignal())
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_tf32_is_torchs_switch(settings: Settings) -> None:
    assert not torch.backends.cuda.matmul.allow_tf32
    try:
        train(settings(allow_tf32=True, max_train_steps=1), StopSignal())
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_a_resumed_run_keeps_its_learning_rates(settings: Settings) -> None:
    values = {"lr_scheduler": "linear", "lr_warmup_steps": 2, "max_train_steps": 5, "checkpointing_steps": 3}
    config = settings(**values, learning_rate=0.6)
    resumed(config, 3)
    rates = [line["lr"] for line in read_metrics(config.train.output_dir)]
    assert rates == pytest.approx([0.0, 0.3, 0.6, 0.4, 0.2])


def test_checkpoints_are_saved_and_pruned_as_asked(settings: Settings) -> None:
    def names(**values: Any) -> list[str]:
        config = settings(str(values), max_train_steps=5, **values)
        train(config, StopSignal())
        return sorted(path.name for path in config.train.output_dir.glob("checkpoint-*"))

    assert names(checkpointing_steps=2) == ["checkpoint-000004", "checkpoint-000005"]
    assert names(checkpointing_steps=1, checkpoints_total_limit=3) == [f"checkpoint-{step:06}" for step in (3, 4, 5)]


def test_a_run_that_ends_before_its_checkpoint_is_refused(settings: Settings) -> None:
    train(settings(max_train_steps=3, checkpointing_steps=2), StopSignal())
    saved = (settings().train.output_dir / "config.toml").read_bytes()
    with pytest.raises(UsageError, match=r"checkpoint-000003 is beyond the run's 2 steps; raise max_train_steps"):
        train(settings(max_train_steps=2), StopSignal())
    assert (settings().train.output_dir / "config.toml").read_bytes() == saved


def test_resume_from_none_refuses_a_begun_run(settings: Settings) -> None:
    train(settings(max_train_steps=1), StopSignal())
    with pytest.raises(UsageError, match=r"choose another train\.output_dir"):
        train(settings(max_train_steps=1, resume_from_checkpoint="none"), StopSignal())


@pytest.mark.parametrize(("every", "expected"), [(0, [5]), (2, [2, 4, 5])])
def test_held_out_losses_are_taken_when_due(every: int, expected: list[int], settings: Settings) -> None:
    config = settings(max_train_steps=5, validation_steps=every)
    train(config, StopSignal())
    lines = read_metrics(config.train.output_dir)
    assert [line["step"] for line in lines if "held_out_loss" in line] == expected
    assert [line["step"] for line in lines if "base_held_out_loss" in line] == expected[:1]


def test_evaluation_does_not_change_the_training(settings: Settings, plain: dict[str, torch.Tensor]) -> None:
    assert equal(export(settings(validation_steps=1)), plain)
    averaged_weights = export(settings("average", ema_decay=0.9))
    assert equal(export(settings("average evaluated", ema_decay=0.9, validation_steps=1)), averaged_weights)


def test_clips_and_timesteps_are_written_when_asked(settings: Settings) -> None:
    train(settings("silent"), StopSignal())
    assert all("clips" not in line for line in read_metrics(settings("silent").train.output_dir))
    train(settings(log_clips=True), StopSignal())
    for line in read_metrics(settings().train.output_dir):
        assert len(line["clips"]) == len(line["timesteps"]) == 2


@pytest.mark.parametrize("optimizer", EXTRAS)
def test_an_optimizer_that_is_not_installed_is_refused(
    optimizer: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.errors.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"train.optimizer = .* package "):
        train(settings(optimizer=optimizer), StopSignal())


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValidationError, match="'auto', 'cpu' or 'cuda'"):
        Train.model_validate({"output_dir": "unused", "device": "tpu9"})


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"prodigy_decouple": True}, "prodigy_decouple needs optimizer = 'prodigy'"),
        ({"prodigy_beta3": 0.0}, "prodigy_beta3 needs"),
        ({"snr_gamma": 0}, "greater than 0"),
        ({"ema_decay": 1.0}, "less than 1"),
    ],
)
def test_contradictory_options_are_refused(values: dict[str, Any], line: str) -> None:
    with pytest.raises(ValidationError, match=line):
        Train(output_dir=Path("unused"), **values)


@pytest.mark.parametrize(
    "values",
    [{"ema_decay": 0.9}, *({"optimizer": optimizer, "learning_rate": 0.5} for optimizer in EXTRAS)],
    ids=["ema_decay", *EXTRAS],
)
def test_every_kind_of_state_resumes_bit_for_bit(values: dict[str, Any], settings: Settings) -> None:
    straight, parts = (settings(name, **values, checkpointing_steps=1) for name in ("straight", "parts"))
    assert equal(resumed(parts, 2), export(straight))
    left, right = (
        load_checkpoint(config.train.output_dir / "checkpoint-000003").tensors for config in (straight, parts)
    )
    assert left.keys() == right.keys() and all(equal(left[name], right[name]) for name in left)

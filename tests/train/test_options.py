"""Every option of [train] changes something that can be seen, or is refused with a reason."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from pydantic import ValidationError
from safetensors.torch import load, load_file, save
from torch import nn

from shared.config import Config, Train
from shared.errors import CacheError, UsageError
from shared.signals import StopSignal
from tests.train import test_optimizer
from train.checkpoint.files import load_checkpoint
from train.loop import train
from train.metrics import read_metrics
from train.optimizer import build_optimizer, load_optimizer_state, optimizer_state, set_learning_rate
from train.run import open_run
from train.state import Learner

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
# Fields with a test of their own below.
SEEN = {
    "output_dir",
    "initial_adapter",
    "max_tokens_per_pack",
    "transformer_engine",
    "allow_tf32",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "validation_steps",
    "log_clips",
    "device",
    "prodigy_beta3",
    "prodigy_decouple",
    "prodigy_use_bias_correction",
    "prodigy_safeguard_warmup",
}


def test_every_option_is_tested_somewhere() -> None:
    here = WEIGHTS.keys() | SEEN | test_optimizer.FIELDS.keys()
    others = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    forgotten = [name for name in Train.model_fields if name not in here and not re.search(rf"\b{name}\b", others)]
    assert forgotten == []
    assert here <= Train.model_fields.keys()


def export(config: Config) -> dict[str, torch.Tensor]:
    path = config.train.output_dir / "export" / "pytorch_lora_weights.safetensors"
    if not path.exists():
        train(config, StopSignal())
    return load_file(path)


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def plain(experiment: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The experiment as it is."""
    folder = tmp_path_factory.mktemp("plain")
    return export(
        experiment.model_copy(update={"train": experiment.train.model_copy(update={"output_dir": folder / "run"})})
    )


def test_the_same_settings_give_the_same_weights(settings: Settings, plain: dict[str, torch.Tensor]) -> None:
    assert equal(export(settings()), plain)


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
    """The held-out loss of any transformer."""
    from train.evaluate import held_out_loss
    from train.run import open_run

    run = open_run(config)
    return held_out_loss(replace(run, transformer=transformer), stopped=lambda: False)


def test_a_target_that_names_no_layer_is_refused_though_another_does(settings: Settings) -> None:
    with pytest.raises(UsageError, match="the transformer has no layer nonsense"):
        train(settings(lora_target_modules=("to_q", "nonsense")), StopSignal())


def test_an_initial_adapter_is_where_the_run_begins(settings: Settings) -> None:
    first = export(settings("first"))
    path = settings("first").train.output_dir / "export"
    onwards = settings("onwards", initial_adapter=path, learning_rate=1e-12, adam_weight_decay=0)
    for name, tensor in export(onwards).items():
        torch.testing.assert_close(tensor, first[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"lora_rank": 8}, "r is 4 there and 8 in this run"),
        ({"lora_alpha": 1}, "lora_alpha is 8.0 there and 1.0"),
        ({"use_rslora": True}, "use_rslora is None there and True"),
        ({"lora_target_modules": ("to_q",)}, "target_modules is"),
        ({"initial_adapter": Path("nowhere")}, "cannot be read"),
    ],
)
def test_an_initial_adapter_of_another_kind_is_refused(change: Any, line: str, settings: Settings) -> None:
    export(settings("first"))
    values = {"initial_adapter": settings("first").train.output_dir / "export"} | change
    with pytest.raises(UsageError, match=line):
        train(settings("onwards", **values), StopSignal())


def test_packs_hold_as_many_clips_as_the_tokens_allow(settings: Settings, plain: dict[str, torch.Tensor]) -> None:
    config = settings(max_tokens_per_pack=10_000)
    weights = export(config)
    assert [line["packs"] for line in read_metrics(config.train.output_dir)] == [1, 1, 1]
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(("engine", "calls"), [("packed", 0), ("reference", 6)])
def test_the_reference_engine_is_diffusers_forward(
    engine: str, calls: int, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, seen = CogVideoXTransformer3DModel.forward, []

    def counted(self: CogVideoXTransformer3DModel, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.training)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(CogVideoXTransformer3DModel, "forward", counted)
    train(settings(transformer_engine=engine), StopSignal())
    assert sum(seen) == calls


def test_tf32_is_torchs_switch(settings: Settings) -> None:
    assert not torch.backends.cuda.matmul.allow_tf32
    try:
        train(settings(allow_tf32=True, max_train_steps=1), StopSignal())
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_each_step_has_its_place_of_the_schedule_also_after_a_resume(settings: Settings) -> None:
    """diffusers' linear: up over the warm-up, then down to nothing, the first step at its value for 0 steps done."""
    values = {"lr_scheduler": "linear", "lr_warmup_steps": 2, "max_train_steps": 5, "checkpointing_steps": 3}
    config = settings(**values, learning_rate=0.6)
    for _ in range(2):
        train(config, StopSignal())
        rates = [line["lr"] for line in read_metrics(config.train.output_dir)]
        assert rates == pytest.approx([0.0, 0.3, 0.6, 0.4, 0.2])
        config = settings(**values, learning_rate=0.6, resume_from_checkpoint="checkpoint-000003")


def test_an_update_is_made_at_the_rate_of_its_own_step(settings: Settings) -> None:
    """The first one of a warm-up at none."""
    run = open_run(settings(lr_scheduler="linear", lr_warmup_steps=2, max_train_steps=5))
    learner, before = Learner(run), {name: value.detach().clone() for name, value in run.parameters}
    for moved in (False, True):
        for _, parameter in run.parameters:
            parameter.grad = torch.ones_like(parameter)
        learner.update()
        assert equal(before, {name: value.detach() for name, value in run.parameters}) != moved


def test_checkpoints_come_when_asked_and_the_oldest_go(settings: Settings) -> None:
    def names(**values: Any) -> list[str]:
        config = settings(str(values), max_train_steps=5, **values)
        train(config, StopSignal())
        return sorted(path.name for path in config.train.output_dir.glob("checkpoint-*"))

    assert names(checkpointing_steps=2) == ["checkpoint-000004", "checkpoint-000005"]
    assert names(checkpointing_steps=1, checkpoints_total_limit=3) == [f"checkpoint-{step:06}" for step in (3, 4, 5)]


def test_resume_from_a_named_checkpoint_or_not_at_all(settings: Settings) -> None:
    straight = export(settings(checkpointing_steps=1))
    folder = settings().train.output_dir
    train(settings(checkpointing_steps=1, resume_from_checkpoint="checkpoint-000002"), StopSignal())
    assert [line["step"] for line in read_metrics(folder)] == [1, 2, 3]
    assert equal(export(settings()), straight)
    with pytest.raises(UsageError, match="choose another"):
        train(settings(resume_from_checkpoint="none"), StopSignal())
    with pytest.raises(UsageError, match="is not in"):
        train(settings(resume_from_checkpoint="checkpoint-000009"), StopSignal())


def test_a_run_that_is_to_end_before_its_checkpoint_is_refused_and_left_as_it_is(settings: Settings) -> None:
    train(settings(max_train_steps=3, checkpointing_steps=2), StopSignal())
    saved = (settings().train.output_dir / "config.toml").read_bytes()
    with pytest.raises(UsageError, match=r"checkpoint-000003 is beyond the run's 2 steps: raise max_train_steps"):
        train(settings(max_train_steps=2), StopSignal())
    assert (settings().train.output_dir / "config.toml").read_bytes() == saved
    train(settings(max_train_steps=2, resume_from_checkpoint="checkpoint-000002"), StopSignal())
    assert [line["step"] for line in read_metrics(settings().train.output_dir)] == [1, 2]


def test_a_run_folder_of_another_run_is_refused(settings: Settings) -> None:
    train(settings(), StopSignal())
    for field, value in {"snr_gamma": 5.0, "timestep_sampling": "stratified", "seed": 1, "ema_decay": 0.5}.items():
        with pytest.raises(CacheError, match=rf"train.{field} was .*, is .*choose another train.output_dir"):
            train(settings(**{field: value}), StopSignal())


@pytest.mark.parametrize(("every", "expected"), [(0, [5]), (2, [2, 4, 5])])
def test_held_out_losses_come_when_asked_and_at_the_end(every: int, expected: list[int], settings: Settings) -> None:
    config = settings(max_train_steps=5, validation_steps=every)
    train(config, StopSignal())
    lines = read_metrics(config.train.output_dir)
    assert [line["step"] for line in lines if "held_out_loss" in line] == expected
    assert [line["step"] for line in lines if "base_held_out_loss" in line] == expected[:1]


def test_evaluating_does_not_change_what_is_trained(settings: Settings, plain: dict[str, torch.Tensor]) -> None:
    assert equal(export(settings(validation_steps=1)), plain)
    averaged_weights = export(settings("average", ema_decay=0.9))
    assert equal(export(settings("average evaluated", ema_decay=0.9, validation_steps=1)), averaged_weights)


def test_the_clips_and_timesteps_are_written_when_asked(settings: Settings) -> None:
    train(settings("silent"), StopSignal())
    assert all("clips" not in line for line in read_metrics(settings("silent").train.output_dir))
    train(settings(log_clips=True), StopSignal())
    for line in read_metrics(settings().train.output_dir):
        assert len(line["clips"]) == len(line["timesteps"]) == 2


@pytest.mark.parametrize("optimizer", EXTRAS)
def test_an_optimizer_that_is_not_installed_is_refused_in_one_line(
    optimizer: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.extras.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"train.optimizer = .* package .* not found"):
        train(settings(optimizer=optimizer), StopSignal())


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValidationError, match="'auto', 'cpu' or 'cuda'"):
        Train(output_dir=Path("unused"), device="tpu9")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"prodigy_decouple": True}, "prodigy_decouple needs optimizer = 'prodigy'"),
        ({"prodigy_beta3": 0.0}, "prodigy_beta3 needs"),
        ({"snr_gamma": 0}, "greater than 0"),
        ({"ema_decay": 1.0}, "less than 1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(values: dict[str, Any], line: str) -> None:
    with pytest.raises(ValidationError, match=line):
        Train(output_dir=Path("unused"), **values)


def steps(optimizer: torch.optim.Optimizer, layers: nn.Module, numbers: range, rate: float = 0.01) -> None:
    for number in numbers:
        inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(number))
        set_learning_rate(optimizer, rate * (1 + number))
        optimizer.zero_grad()
        layers(inputs).square().mean().backward()
        optimizer.step()


def small_model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 5))


@pytest.mark.parametrize(
    "field",
    ["prodigy_beta3", "prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup"],
)
def test_each_option_of_prodigy_changes_its_weights(field: str) -> None:
    pytest.importorskip("prodigyopt")
    value = 0.5 if field == "prodigy_beta3" else True
    results = []
    for values in ({}, {field: value}):
        layers = small_model()
        settings = Train(
            output_dir=Path("unused"), optimizer="prodigy", learning_rate=1, adam_weight_decay=0.1, **values
        )
        steps(build_optimizer(layers.named_parameters(), settings), layers, range(20), rate=1.0)
        results.append(layers[0].weight.detach().clone())
    assert not torch.equal(*results)


@pytest.mark.parametrize("optimizer", EXTRAS)
@pytest.mark.parametrize("stop", [1, 6])
def test_an_optional_optimizer_goes_on_from_a_file_bit_for_bit(optimizer: Any, stop: int) -> None:
    pytest.importorskip(EXTRAS[optimizer])
    settings = Train(output_dir=Path("unused"), optimizer=optimizer, learning_rate=1)
    straight = small_model()
    straight_optimizer = build_optimizer(straight.named_parameters(), settings)
    steps(straight_optimizer, straight, range(12), rate=1.0)

    first = small_model()
    first_optimizer = build_optimizer(first.named_parameters(), settings)
    steps(first_optimizer, first, range(stop), rate=1.0)
    weights, state = save(first.state_dict()), save(optimizer_state(first_optimizer))
    second = small_model()
    second.load_state_dict(load(weights))
    second_optimizer = build_optimizer(second.named_parameters(), settings)
    load_optimizer_state(second_optimizer, load(state))
    steps(second_optimizer, second, range(stop, 12), rate=1.0)

    assert equal(second.state_dict(), straight.state_dict())
    assert equal(optimizer_state(second_optimizer), optimizer_state(straight_optimizer))


@pytest.mark.parametrize("optimizer", EXTRAS)
def test_the_state_of_another_optimizer_is_refused(optimizer: Any) -> None:
    pytest.importorskip(EXTRAS[optimizer])
    layers = small_model()
    settings = Train(output_dir=Path("unused"), optimizer=optimizer, learning_rate=1)
    built = build_optimizer(layers.named_parameters(), settings)
    steps(built, layers, range(2))
    state = optimizer_state(built)
    with pytest.raises(CacheError, match="belongs to no parameter"):
        load_optimizer_state(built, state | {"4.weight.exp_avg": torch.zeros(2)})
    with pytest.raises(CacheError, match="is missing"):
        load_optimizer_state(built, {name: value for name, value in state.items() if not name.startswith("2.weight.")})


@pytest.mark.parametrize("optimizer", EXTRAS)
def test_an_optional_optimizer_trains_and_resumes_a_run(optimizer: str, settings: Settings) -> None:
    pytest.importorskip(EXTRAS[optimizer])
    values = {"optimizer": optimizer, "learning_rate": 0.5, "checkpointing_steps": 1}
    straight = export(settings("straight", **values))
    train(settings("parts", **values), StopSignal())
    train(settings("parts", **values, resume_from_checkpoint="checkpoint-000002"), StopSignal())
    assert equal(export(settings("parts")), straight)
    folders = [settings(name).train.output_dir for name in ("straight", "parts")]
    left, right = (load_checkpoint(folder / "checkpoint-000003").tensors["optimizer"] for folder in folders)
    assert equal(left, right)


def test_the_average_of_the_weights_resumes_bit_for_bit(settings: Settings) -> None:
    values = {"ema_decay": 0.9, "checkpointing_steps": 1}
    straight = export(settings("straight", **values))
    train(settings("parts", **values), StopSignal())
    train(settings("parts", **values, resume_from_checkpoint="checkpoint-000002"), StopSignal())
    assert equal(export(settings("parts")), straight)


def test_the_export_says_how_it_was_scaled(settings: Settings) -> None:
    from safetensors import safe_open

    for name in ("use_rslora", "use_dora"):
        config = settings(name, **{name: True})
        train(config, StopSignal())
        with safe_open(config.train.output_dir / "export" / "pytorch_lora_weights.safetensors", "pt") as file:
            assert json.loads(file.metadata()["lora_adapter_metadata"])[f"transformer.{name}"] is True

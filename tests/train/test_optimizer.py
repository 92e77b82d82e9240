"""Tests of the optimizer, the learning rate and the optimizer's state on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from shared.config import Train
from shared.errors import UsageError
from train.optimizer import build_optimizer, learning_rate_factor, load_optimizer_state, optimizer_state

NUM_STEPS = 20
FIELDS: dict[str, tuple[dict[str, Any], Any]] = {
    "optimizer": ({"adam_weight_decay": 0.1}, "adam"),
    "learning_rate": ({}, 2e-4),
    "lr_scheduler": ({}, "linear"),
    "lr_warmup_steps": ({"lr_scheduler": "cosine"}, 5),
    "lr_num_cycles": ({"lr_scheduler": "cosine_with_restarts"}, 3),
    "lr_power": ({"lr_scheduler": "polynomial"}, 2.0),
    "adam_beta1": ({}, 0.5),
    "adam_beta2": ({}, 0.5),
    "adam_epsilon": ({}, 1e-3),
    "adam_weight_decay": ({}, 0.1),
}
"""Fields of [train] that shape the optimizer: the settings they matter under, and another value."""
EXTRAS = {"prodigy": "prodigyopt", "adamw8bit": "bitsandbytes"}


def settings(**values: Any) -> Train:
    return Train(output_dir=Path("unused"), **values)


def model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(37, 19), nn.Tanh(), nn.Linear(19, 5, bias=False))


def train(layers: nn.Module, optimizer: torch.optim.Optimizer, steps: range, values: Train) -> None:
    """Run the steps; the data depends on the step alone."""
    factor = learning_rate_factor(values, NUM_STEPS)
    for step in steps:
        inputs = torch.randn(8, 37, generator=torch.Generator().manual_seed(step))
        optimizer.param_groups[0]["lr"] = values.learning_rate * factor(step)
        optimizer.zero_grad()
        layers(inputs).square().mean().backward()
        optimizer.step()


def weights_after(values: Train, steps: int = NUM_STEPS) -> list[Tensor]:
    layers = model()
    train(layers, build_optimizer(layers.named_parameters(), values), range(steps), values)
    return [parameter.detach() for parameter in layers.parameters()]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_changes_the_trained_weights(field: str) -> None:
    context, other = FIELDS[field]
    plain = settings(**context)
    assert equal(weights_after(plain), weights_after(plain))
    assert not equal(weights_after(plain), weights_after(settings(**context, **{field: other})))


def test_every_field_of_the_optimizer_is_tested() -> None:
    named = {name for name in Train.model_fields if name.startswith(("adam_", "lr_", "optimizer", "learning_rate"))}
    assert named == FIELDS.keys()


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_the_published_formula(optimizer: Any, weight_decay: float) -> None:
    """Adam: Kingma and Ba, algorithm 1, with L2 decay; AdamW: Loshchilov and Hutter, algorithm 2."""
    values = settings(
        optimizer=optimizer,
        learning_rate=0.01,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-3,
        adam_weight_decay=weight_decay,
    )
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    built = build_optimizer([("weight", weight)], values)
    expected = weight.detach().clone()
    first, second = torch.zeros_like(expected), torch.zeros_like(expected)
    for step in range(1, 6):
        gradient = torch.tensor([0.5, 0.25, -1.0], dtype=torch.float64) * step
        weight.grad = gradient.clone()
        built.step()
        if optimizer == "adam":
            gradient = gradient + weight_decay * expected
        else:
            expected = expected * (1 - 0.01 * weight_decay)
        first = 0.8 * first + 0.2 * gradient
        second = 0.95 * second + 0.05 * gradient.square()
        corrected = first / (1 - 0.8**step), second / (1 - 0.95**step)
        expected = expected - 0.01 * corrected[0] / (corrected[1].sqrt() + 1e-3)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("constant", [1, 1, 1, 1, 1, 1, 1]),
        ("constant_with_warmup", [0, 0.5, 1, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [0, 0.5, 1, 0.8535533905932737, 0.5, 0.14644660940672627, 0]),
        ("cosine_with_restarts", [0, 0.5, 1, 0.5, 1, 0.5, 0]),
        ("polynomial", [0, 0.5, 1, 0.5629375, 0.25075, 0.0634375, 0.001]),
    ],
)
def test_the_learning_rate_has_the_named_shape(scheduler: Any, expected: list[float]) -> None:
    values = settings(lr_scheduler=scheduler, lr_warmup_steps=2, lr_num_cycles=2, lr_power=2.0)
    factor = learning_rate_factor(values, 6)
    assert [factor(step) for step in range(7)] == pytest.approx(expected, abs=1e-12)


def test_an_undefined_polynomial_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match="lr_warmup_steps = 20: polynomial must have fewer"):
        learning_rate_factor(settings(lr_scheduler="polynomial", lr_warmup_steps=20), NUM_STEPS)
    with pytest.raises(UsageError, match="learning_rate = 1e-08"):
        learning_rate_factor(settings(lr_scheduler="polynomial", learning_rate=1e-8), NUM_STEPS)


@pytest.mark.parametrize("optimizer", EXTRAS)
def test_an_optimizer_that_is_not_installed_is_refused(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.errors.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"train.optimizer = .* package "):
        build_optimizer(model().named_parameters(), settings(optimizer=optimizer))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", *EXTRAS])
def test_a_run_resumed_from_a_file_repeats_the_straight_run_bitwise(optimizer: Any) -> None:
    if optimizer in EXTRAS:
        pytest.importorskip(EXTRAS[optimizer])
    stop, values = 7, settings(optimizer=optimizer, lr_scheduler="cosine", lr_warmup_steps=3, learning_rate=0.5)
    straight = model()
    straight_optimizer = build_optimizer(straight.named_parameters(), values)
    train(straight, straight_optimizer, range(NUM_STEPS), values)

    first = model()
    first_optimizer = build_optimizer(first.named_parameters(), values)
    train(first, first_optimizer, range(stop), values)
    weights, state = save(first.state_dict()), save(optimizer_state(first_optimizer))

    second = model()
    second.load_state_dict(load(weights))
    second_optimizer = build_optimizer(second.named_parameters(), values)
    load_optimizer_state(second_optimizer, load(state))
    train(second, second_optimizer, range(stop, NUM_STEPS), values)

    assert equal(list(second.parameters()), list(straight.parameters()))
    left, right = optimizer_state(second_optimizer), optimizer_state(straight_optimizer)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_state_is_named_by_parameter_and_loaded_as_a_copy() -> None:
    layers = model()
    optimizer = build_optimizer(layers.named_parameters(), settings())
    train(layers, optimizer, range(3), settings())
    state = {name: tensor.clone() for name, tensor in optimizer_state(optimizer).items()}
    parts = ("step", "exp_avg", "exp_avg_sq")
    assert state.keys() == {f"{name}.{part}" for name in ("0.weight", "0.bias", "2.weight") for part in parts}
    assert all(tensor.any() for tensor in state.values())
    assert state["0.bias.step"] == 3
    load_optimizer_state(optimizer, state)
    state["0.bias.exp_avg"].fill_(9)
    assert not torch.equal(optimizer_state(optimizer)["0.bias.exp_avg"], state["0.bias.exp_avg"])


@pytest.mark.parametrize(
    "field", ["prodigy_beta3", "prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup"]
)
def test_each_option_of_prodigy_changes_its_weights(field: str) -> None:
    pytest.importorskip("prodigyopt")
    plain: dict[str, Any] = {"optimizer": "prodigy", "learning_rate": 1, "adam_weight_decay": 0.1}
    plain |= {"lr_scheduler": "linear", "lr_warmup_steps": 5}
    other = plain | {field: 0.5 if field == "prodigy_beta3" else True}
    assert not equal(weights_after(settings(**plain)), weights_after(settings(**other)))

"""The optimizer, the learning rate as a pure function of the step, and the optimizer's state as named tensors."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from shared.config import Train
from shared.errors import CacheError, UsageError
from train.extras import build_extra

GROUP_NUMBERS = ("d", "d_max", "d_numerator", "k", "lr_max", "weight_sum")
"""What prodigy and schedule-free carry from step to step in their parameter group."""


def build_optimizer(parameters: Iterable[tuple[str, nn.Parameter]], train: Train) -> torch.optim.Optimizer:
    """The optimizer over the trainable named parameters, one group, as in diffusers' train_cogvideox_lora.py.

    adam adds weight decay to the gradient, which is the reference script's. Raises `UsageError` if an optional extra is
    not installed.
    """
    named = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    assert named, "no trainable parameters"
    if train.optimizer not in ("adam", "adamw"):
        return build_extra(named, train)
    kind: type[torch.optim.Adam] = torch.optim.Adam if train.optimizer == "adam" else torch.optim.AdamW
    return kind(
        named,
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        weight_decay=train.adam_weight_decay,
        fused=True,
    )


def learning_rate_factor(train: Train, num_steps: int) -> Callable[[int], float]:
    """The learning rate of optimizer step `step` (from 0) is `learning_rate` times the returned function's value.

    The shapes are `diffusers.optimization`'s. Steps are optimizer steps on any number of processes (the reference
    script counts each process). Raises `UsageError` where the polynomial is not defined.
    """
    if train.lr_scheduler == "polynomial" and train.lr_warmup_steps >= num_steps:
        raise UsageError(
            f"train.lr_warmup_steps = {train.lr_warmup_steps}: polynomial needs fewer than the run's {num_steps} steps"
        )
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=train.learning_rate)
    try:
        scheduler = get_scheduler(
            train.lr_scheduler,
            optimizer,
            num_warmup_steps=train.lr_warmup_steps,
            num_training_steps=num_steps,
            num_cycles=train.lr_num_cycles,
            power=train.lr_power,
        )
    except ValueError as error:  # the polynomial ends at 1e-7
        raise UsageError(f"train.learning_rate = {train.learning_rate}: {error}") from None
    shape = scheduler.lr_lambdas[0]
    return lambda step: float(shape(step))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """The learning rate of the next `optimizer.step()`."""
    for group in optimizer.param_groups:
        group["lr"] = value


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`{parameter}.{part}` for all that the optimizer keeps, and `group.{number}`, sharing its memory."""
    (group,) = optimizer.param_groups
    tensors = {f"group.{name}": _as_tensor(group[name]) for name in GROUP_NUMBERS if name in group}
    for name, parameter in zip(group["param_names"], group["params"], strict=True):
        for part, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{part}"] = _as_tensor(value)
    return tensors


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Set the whole state, bit for bit. Raises `CacheError`, and changes nothing, if a name does not belong here."""
    (group,) = optimizer.param_groups
    numbers = {name: f"group.{name}" for name in GROUP_NUMBERS if name in group}
    states: dict[str, dict[str, Any]] = {name: {} for name in group["param_names"]}
    devices = {name: parameter.device for name, parameter in zip(group["param_names"], group["params"], strict=True)}
    for name, tensor in tensors.items():
        parameter, _, part = name.rpartition(".")
        if parameter in states:
            states[parameter][part] = _from_tensor(tensor, devices[parameter])
        elif name not in numbers.values():
            raise CacheError(f"optimizer state: {name} belongs to no parameter of this run")
    missing = [name for name in numbers.values() if name not in tensors]
    if any(states.values()):
        missing += [name for name, state in states.items() if not state]
    if missing:
        raise CacheError(f"optimizer state: {missing[0]} is missing")
    for name, key in numbers.items():
        group[name] = _from_tensor(tensors[key], torch.device("cpu"))
    for name, parameter in zip(group["param_names"], group["params"], strict=True):
        if states[name]:
            optimizer.state[parameter] = states[name]


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    assert isinstance(value, int | float) and math.isfinite(value), value
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def _from_tensor(tensor: Tensor, device: torch.device) -> Any:
    if tensor.ndim == 0 and tensor.dtype in (torch.int64, torch.float64):
        return tensor.item()
    return tensor.to(device, copy=True)

"""The optimizer, the learning rate as a pure function of the step, and the optimizer's state as named tensors."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from shared.config import Train
from shared.errors import UsageError, require_extra

GROUP_NUMBERS = ("d", "d_max", "d_numerator", "k")
"""Numbers that prodigy keeps in its parameter group between steps."""

logger = logging.getLogger(__name__)


def build_optimizer(parameters: Iterable[tuple[str, nn.Parameter]], train: Train) -> torch.optim.Optimizer:
    """Build the optimizer over the trained parameters, in one group.

    adam adds weight decay to the gradient, as diffusers' train_cogvideox_lora.py does. prodigy (Mishchenko and Defazio
    2023) and adamw8bit are optional packages, imported only here. bitsandbytes runs AdamW's kernel for Adam8bit too, so
    adam8bit does not exist. Raises `UsageError` if the package is not installed.
    """
    named = list(parameters)
    values = [parameter for _, parameter in named]
    rate, decay, epsilon = train.learning_rate, train.adam_weight_decay, train.adam_epsilon
    betas = (train.adam_beta1, train.adam_beta2)
    optimizer: torch.optim.Optimizer
    if train.optimizer == "prodigy":
        require_extra("prodigyopt", "train.optimizer = 'prodigy'", "prodigy")
        from prodigyopt import Prodigy

        if rate <= 0.1:
            logger.warning("train.learning_rate = %g: prodigy scales the rate itself; 1.0 is usual", rate)
        with redirect_stdout(StringIO()):  # Prodigy prints its settings
            optimizer = Prodigy(
                values,
                lr=rate,
                betas=betas,
                beta3=train.prodigy_beta3,
                eps=epsilon,
                weight_decay=decay,
                decouple=train.prodigy_decouple,
                use_bias_correction=train.prodigy_use_bias_correction,
                safeguard_warmup=train.prodigy_safeguard_warmup,
            )
    elif train.optimizer == "adamw8bit":
        require_extra("bitsandbytes", "train.optimizer = 'adamw8bit'", "bitsandbytes")
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit(values, lr=rate, betas=betas, eps=epsilon, weight_decay=decay)
    else:
        kind: type[torch.optim.Adam] = torch.optim.Adam if train.optimizer == "adam" else torch.optim.AdamW
        optimizer = kind(values, lr=rate, betas=betas, eps=epsilon, weight_decay=decay, fused=True)
    optimizer.param_groups[0]["param_names"] = [name for name, _ in named]
    return optimizer


def learning_rate_factor(train: Train, num_steps: int) -> Callable[[int], float]:
    """Return the function from an optimizer step (from 0) to the factor of `learning_rate`.

    The shapes are `diffusers.optimization`'s. Steps are optimizer steps on any number of processes (the reference
    script counts each process). Raises `UsageError` where the polynomial is not defined.
    """
    if train.lr_scheduler == "polynomial" and train.lr_warmup_steps >= num_steps:
        raise UsageError(
            f"train.lr_warmup_steps = {train.lr_warmup_steps}: polynomial must have fewer than the run's {num_steps} "
            "steps; lower the warm-up"
        )
    try:
        scheduler = get_scheduler(
            train.lr_scheduler,
            torch.optim.SGD([torch.zeros(1)], lr=train.learning_rate),
            num_warmup_steps=train.lr_warmup_steps,
            num_training_steps=num_steps,
            num_cycles=train.lr_num_cycles,
            power=train.lr_power,
        )
    except ValueError as error:  # the polynomial ends at 1e-7
        raise UsageError(f"train.learning_rate = {train.learning_rate}: {error}") from None
    shape = scheduler.lr_lambdas[0]
    return lambda step: float(shape(step))


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the whole state as tensors `{parameter}.{part}` and `group.{number}`, which share the optimizer's memory.

    A Python number becomes a 0-d tensor of int64 or float64, which no parameter's own state uses (adapters are fp32).
    """
    (group,) = optimizer.param_groups
    tensors = {f"group.{name}": _as_tensor(group[name]) for name in GROUP_NUMBERS if name in group}
    for name, parameter in zip(group["param_names"], group["params"], strict=True):
        for part, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{part}"] = _as_tensor(value)
    return tensors


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Set the whole state, bit for bit; the names must be those of `optimizer_state`."""
    (group,) = optimizer.param_groups
    named = dict(zip(group["param_names"], group["params"], strict=True))
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        if name == "group":
            group[part] = _from_tensor(tensor, torch.device("cpu"))
        else:
            optimizer.state[named[name]][part] = _from_tensor(tensor, named[name].device)
    assert optimizer_state(optimizer).keys() == tensors.keys(), "another optimizer's state"
    assert len(optimizer.state) in (0, len(named)), "some parameters have no state"


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    assert isinstance(value, int | float) and math.isfinite(value), value
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def _from_tensor(tensor: Tensor, device: torch.device) -> Any:
    if tensor.ndim == 0 and tensor.dtype in (torch.int64, torch.float64):
        return tensor.item()
    return tensor.to(device, copy=True)

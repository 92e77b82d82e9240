"""The trained state of a run: adapter, optimizer, average of the weights, step; all of it as named tensors."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from shared.config import Train
from shared.errors import CacheError, UsageError, require_extra
from train.checkpoint.files import Checkpoint
from train.run import Run
from train.transformer.load import adapter_weights, load_adapter_weights

GROUP_NUMBERS = ("d", "d_max", "d_numerator", "k")
"""Numbers that prodigy keeps in its parameter group between steps."""
Named = Sequence[tuple[str, nn.Parameter]]

logger = logging.getLogger(__name__)


class TrainState:
    """The state at the beginning until `resume`; `update` advances it. The same on every process."""

    def __init__(self, run: Run) -> None:
        self.step = 0
        """Optimizer steps done."""
        self.saved_step = 0
        """Step of the newest checkpoint; 0 at the beginning, which needs none."""
        self.resumed_step = 0
        """Step of the checkpoint that this process resumed; 0 without one."""
        self._run = run
        self._train = run.config.train
        self._parameters = run.parameters
        self._optimizer = build_optimizer(self._parameters, self._train)
        self._learning_rate_factor = learning_rate_factor(self._train, run.num_steps)
        averaged = self._parameters if self._train.ema_decay else []
        self._average = {name: parameter.detach().clone() for name, parameter in averaged}

    def resume(self, checkpoint: Checkpoint) -> None:
        """Restore a checkpoint bit for bit.

        Raises `UsageError` if the run ends before the checkpoint's step, `CacheError` if the checkpoint lacks a file.
        """
        if checkpoint.step > self._run.num_steps:
            raise UsageError(
                f"train.max_train_steps: {checkpoint.path} is beyond the run's {self._run.num_steps} steps; raise "
                "max_train_steps or num_train_epochs, or move newer checkpoints away"
            )
        for name, own in self.tensors().items():
            found = checkpoint.tensors.get(name)
            if found is None or (name != "optimizer" and found.keys() != own.keys()):
                raise CacheError(
                    f"{checkpoint.path / name}.safetensors: not the tensors of this run; move the checkpoint away"
                )
        load_adapter_weights(self._run.transformer, checkpoint.tensors["adapter"])
        load_optimizer_state(self._optimizer, checkpoint.tensors["optimizer"])
        for name, weights in self._average.items():
            weights.copy_(checkpoint.tensors["ema"][name])
        self.step = self.saved_step = self.resumed_step = checkpoint.step

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Return the tensors of a checkpoint by file, sharing memory."""
        adapter, optimizer = adapter_weights(self._run.transformer), optimizer_state(self._optimizer)
        return {"adapter": adapter, "optimizer": optimizer, **({"ema": self._average} if self._average else {})}

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next update."""
        return self._train.learning_rate * self._learning_rate_factor(self.step)

    def update(self) -> None:
        """Take one optimizer step and clear the gradients."""
        self._optimizer.param_groups[0]["lr"] = self.learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self._average:
            update_average(self._average, self._parameters, self._train.ema_decay, self.step)

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Give the adapter the weights to evaluate, preview and export, within the context: the average, if any."""
        trained = {name: parameter.detach().clone() for name, parameter in self._parameters} if self._average else {}
        _copy(self._average, self._parameters)
        try:
            yield
        finally:
            _copy(trained, self._parameters)


@torch.no_grad()
def update_average(average: Mapping[str, Tensor], parameters: Named, decay: float, step: int) -> None:
    """Update the average in place after optimizer step `step` (from 1).

    The decay grows as (1 + step) / (10 + step) up to `decay`, so that a short run is not an average of its start
    (diffusers `training_utils.EMAModel`).
    """
    decay = min(decay, (1 + step) / (10 + step))
    for name, parameter in parameters:
        average[name].lerp_(parameter, 1 - decay)


@torch.no_grad()
def _copy(weights: Mapping[str, Tensor], parameters: Named) -> None:
    for name, parameter in parameters:
        if name in weights:
            parameter.copy_(weights[name])


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
    """Set the whole state, bit for bit.

    Raises `CacheError`, and changes nothing, if a name is unknown or missing.
    """
    (group,) = optimizer.param_groups
    named = dict(zip(group["param_names"], group["params"], strict=True))
    numbers = [name for name in GROUP_NUMBERS if name in group]
    states: dict[str, dict[str, Any]] = {name: {} for name in ("group", *named)}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        if name not in states or (name == "group" and part not in numbers):
            raise CacheError(f"optimizer state: {key} belongs to no parameter of this run")
        states[name][part] = _from_tensor(tensor, named[name].device if name in named else torch.device("cpu"))
    missing = [f"group.{name}" for name in numbers if name not in states["group"]]
    if any(states[name] for name in named):
        missing += [name for name in named if not states[name]]
    if missing:
        raise CacheError(f"optimizer state: {missing[0]} is missing")
    group.update(states.pop("group"))
    for name, state in states.items():
        if state:
            optimizer.state[named[name]] = state


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    assert isinstance(value, int | float) and math.isfinite(value), value
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def _from_tensor(tensor: Tensor, device: torch.device) -> Any:
    if tensor.ndim == 0 and tensor.dtype in (torch.int64, torch.float64):
        return tensor.item()
    return tensor.to(device, copy=True)

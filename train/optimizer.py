"""The optimizer, the learning rate as a pure function of the step, and the optimizer's state as named tensors."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from shared.config import Train
from shared.errors import CacheError, UsageError
from train.extras import build_extra, extra_state, load_extra_state

MOMENTS = ("exp_avg", "exp_avg_sq")
FUSED_DEVICES = {"cpu", "cuda"}


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
        fused=all(parameter.device.type in FUSED_DEVICES for _, parameter in named),
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
    """`{parameter}.step`, `.exp_avg` and `.exp_avg_sq` of each parameter, sharing the optimizer's memory.

    A parameter that never had a gradient gives zeros, which is the state Adam would start it from. Of an optional
    optimizer the tensors are its own, see `train.extras`.
    """
    if not isinstance(optimizer, torch.optim.Adam):
        return extra_state(optimizer)
    tensors: dict[str, Tensor] = {}
    for name, parameter in _named_parameters(optimizer):
        state = optimizer.state.get(parameter, {})
        tensors[f"{name}.step"] = state.get("step", torch.zeros(()))
        for moment in MOMENTS:
            tensors[f"{name}.{moment}"] = state[moment] if state else torch.zeros_like(parameter, requires_grad=False)
    return tensors


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Set the whole state from `optimizer_state`'s tensors, bit for bit, on the parameters' devices.

    Raises `CacheError`, and changes nothing, if a name is missing or unknown or a shape or dtype differs.
    """
    if not isinstance(optimizer, torch.optim.Adam):
        load_extra_state(optimizer, tensors)
        return
    expected = {
        f"{name}.{part}": parameter if part in MOMENTS else torch.zeros(())
        for name, parameter in _named_parameters(optimizer)
        for part in ("step", *MOMENTS)
    }
    for name, like in expected.items():
        if name not in tensors:
            raise CacheError(f"optimizer state: {name} is missing")
        found = tensors[name]
        if (found.shape, found.dtype) != (like.shape, like.dtype):
            raise CacheError(
                f"optimizer state: {name} is {found.dtype} {list(found.shape)}, not {like.dtype} {list(like.shape)}"
            )
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise CacheError(f"optimizer state: {unknown[0]} belongs to no parameter of this run")
    fused = optimizer.defaults["fused"]
    for name, parameter in _named_parameters(optimizer):
        # A fused optimizer keeps its step count beside the parameter, the others keep it on the CPU.
        optimizer.state[parameter] = {
            "step": tensors[f"{name}.step"].to(parameter.device if fused else "cpu", copy=True),
            **{moment: tensors[f"{name}.{moment}"].to(parameter.device, copy=True) for moment in MOMENTS},
        }


def _named_parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)

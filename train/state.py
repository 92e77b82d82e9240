"""What a run trains and saves: the adapter in its transformer, the optimizer, the average of the weights, the step."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from shared.errors import UsageError
from train.checkpoint.files import Checkpoint
from train.optimizer import (
    build_optimizer,
    learning_rate_factor,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)
from train.run import Run
from train.transformer.load import adapter_weights, load_adapter_weights

Named = Sequence[tuple[str, nn.Parameter]]


class Learner:
    """At the beginning until `resume`; moved on by `update`. The same on every process."""

    def __init__(self, run: Run) -> None:
        self.step = 0
        """Optimizer steps done."""
        self._run = run
        self._settings = run.config.train
        self._parameters = run.parameters
        self._optimizer = build_optimizer(self._parameters, self._settings)
        self._learning_rate_factor = learning_rate_factor(self._settings, run.num_steps)
        self._average = start_average(self._parameters) if self._settings.ema_decay else {}

    def resume(self, checkpoint: Checkpoint) -> None:
        """Stand where the checkpoint was saved, bit for bit. Raises `UsageError` if the run is to end before."""
        if checkpoint.step > self._run.num_steps:
            raise UsageError(
                f"train: {checkpoint.path} is beyond the run's {self._run.num_steps} steps: raise max_train_steps or "
                "num_train_epochs, or name an older checkpoint in resume_from_checkpoint"
            )
        load_adapter_weights(self._run.transformer, checkpoint.tensors["adapter"])
        load_optimizer_state(self._optimizer, checkpoint.tensors["optimizer"])
        for name, weights in self._average.items():
            weights.copy_(checkpoint.tensors["ema"][name])
        self.step = checkpoint.step

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """What a checkpoint holds, by file, sharing memory."""
        adapter, optimizer = adapter_weights(self._run.transformer), optimizer_state(self._optimizer)
        return {"adapter": adapter, "optimizer": optimizer, **({"ema": self._average} if self._average else {})}

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return self._settings.learning_rate * self._learning_rate_factor(self.step)

    def update(self) -> None:
        """Apply the gradients, which are gone then: one optimizer step."""
        set_learning_rate(self._optimizer, self.learning_rate)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self._average:
            update_average(self._average, self._parameters, self._settings.ema_decay, self.step)

    def evaluated(self) -> AbstractContextManager[None]:
        """Inside, the adapter holds the weights to evaluate, preview and export: an average, if the run has one."""
        return swapped(self._parameters, self._average) if self._average else nullcontext()


def start_average(parameters: Named) -> dict[str, Tensor]:
    """The average before the first step: the weights themselves."""
    return {name: parameter.detach().clone() for name, parameter in parameters}


@torch.no_grad()
def update_average(average: Mapping[str, Tensor], parameters: Named, decay: float, step: int) -> None:
    """Move towards the weights after optimizer step `step` (from 1), in place.

    The decay grows as (1 + step) / (10 + step) up to `decay`, so that a short run is not an average of its start
    (diffusers `training_utils.EMAModel`).
    """
    decay = min(decay, (1 + step) / (10 + step))
    for name, parameter in parameters:
        average[name].lerp_(parameter, 1 - decay)


@contextmanager
def swapped(parameters: Named, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the parameters hold `weights`; afterwards what they held, bit for bit."""
    trained = {name: parameter.detach().clone() for name, parameter in parameters}
    _copy(parameters, weights)
    try:
        yield
    finally:
        _copy(parameters, trained)


@torch.no_grad()
def _copy(parameters: Named, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters:
        parameter.copy_(weights[name])

"""The trained state of a run: adapter, optimizer, average of the weights, step; all of it as named tensors."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from shared.errors import CacheError, UsageError
from train.checkpoint.files import Checkpoint
from train.optimizer import build_optimizer, learning_rate_factor, load_optimizer_state, optimizer_state
from train.run import Run
from train.transformer.load import adapter_weights, load_adapter_weights

Named = Sequence[tuple[str, nn.Parameter]]


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

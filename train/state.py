"""The trained state of a run: adapter, optimizer and step; the tensors have names."""

from collections.abc import Mapping

from torch import Tensor

from shared.errors import UsageError
from train.checkpoint.resume import Start
from train.optimizer import build_optimizer, learning_rate_factor, load_optimizer_state, optimizer_state
from train.run import Run
from train.transformer.load import adapter_weights, load_adapter_weights


class TrainState:
    """The state of the checkpoint that a run starts from, bit for bit; `update` advances it. The same on every process.

    Raises `UsageError` if the run ends before the checkpoint's step.
    """

    def __init__(self, run: Run, start: Start) -> None:
        self.start = start
        self.step = self.saved_step = self.resumed_step = 0 if start.checkpoint is None else start.checkpoint.step
        """Optimizer steps done, those in the newest checkpoint, and those in the resumed one; 0 at the beginning."""
        self._run = run
        self._train = run.config.train
        self._optimizer = build_optimizer(run.parameters, self._train)
        self._learning_rate_factor = learning_rate_factor(self._train, run.num_steps)
        if start.checkpoint is None:
            return
        if self.step > run.num_steps:
            raise UsageError(
                f"train.max_train_steps: {start.checkpoint.path} is beyond the run's {run.num_steps} steps; raise "
                "max_train_steps or num_train_epochs, or move newer checkpoints away"
            )
        load_adapter_weights(run.transformer, start.checkpoint.tensors["adapter"])
        load_optimizer_state(self._optimizer, start.checkpoint.tensors["optimizer"])

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Return the tensors of a checkpoint by file, sharing memory."""
        return {"adapter": adapter_weights(self._run.transformer), "optimizer": optimizer_state(self._optimizer)}

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

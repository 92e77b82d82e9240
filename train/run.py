"""The record of an open run."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers import CogVideoXTransformer3DModel

from shared.cache.view import View
from shared.config import Config
from shared.model.conventions import Conventions
from shared.model.pretrained import Component
from train.data.dataset import Dataset
from train.data.order import Windows
from train.memory.trial import Trial
from train.objective import NoiseSchedule
from train.transformer.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Config, processes, data and model of a run: everything that a step reads."""

    config: Config
    accelerator: Accelerator
    view: View
    conventions: Conventions
    schedule: NoiseSchedule
    dataset: Dataset
    """The clips to train on."""
    windows: Windows | None
    """Order of the training clips; None shuffles all of them."""
    held_out: Dataset
    base: Component
    """The transformer's files."""
    transformer: CogVideoXTransformer3DModel
    engine: Engine
    trial: Trial | None
    """Measured memory of the plan; None on a CPU, where plans are not tried."""
    num_steps: int
    """Optimizer steps at the end of the run, counted from its beginning."""

    @property
    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The adapter's parameters by name."""
        return [(name, value) for name, value in self.transformer.named_parameters() if value.requires_grad]

    @property
    def width(self) -> int:
        """D of the transformer."""
        return int(self.transformer.config.num_attention_heads * self.transformer.config.attention_head_dim)

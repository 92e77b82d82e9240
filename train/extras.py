"""The optimizers that are optional extras: prodigyopt, schedulefree, bitsandbytes. Imported only when a run asks.

Their state is saved as it is, all as tensors: a number beside the tensors becomes a 0-d tensor of int64 or float64,
which holds it exactly and which no parameter's own state uses (adapters are fp32).
"""

import logging
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO

import torch
from torch import Tensor, nn

from shared.config import Train
from shared.extras import require_extra

EXTRAS = {
    "prodigy": ("prodigyopt", "prodigy"),
    "schedulefree": ("schedulefree", "schedulefree"),
    "adamw8bit": ("bitsandbytes", "bitsandbytes"),
}
"""Optimizer -> module and extra of this package."""

logger = logging.getLogger(__name__)


def build_extra(named: Sequence[tuple[str, nn.Parameter]], train: Train) -> torch.optim.Optimizer:
    """prodigy (Mishchenko and Defazio 2023), schedule-free AdamW (Defazio et al. 2024) or AdamW with 8-bit state.

    bitsandbytes' Adam8bit runs AdamW's kernel, so there is no adam8bit here.
    """
    module, extra = EXTRAS[train.optimizer]
    require_extra(module, f"train.optimizer = {train.optimizer!r}", extra)
    parameters = [parameter for _, parameter in named]
    betas = (train.adam_beta1, train.adam_beta2)
    optimizer: torch.optim.Optimizer
    if train.optimizer == "prodigy":
        from prodigyopt import Prodigy

        if train.learning_rate <= 0.1:
            logger.warning("train.learning_rate = %g: prodigy finds its own; 1.0 is usual", train.learning_rate)
        with redirect_stdout(StringIO()):  # it prints
            optimizer = Prodigy(
                parameters,
                lr=train.learning_rate,
                betas=betas,
                beta3=train.prodigy_beta3,
                eps=train.adam_epsilon,
                weight_decay=train.adam_weight_decay,
                decouple=train.prodigy_decouple,
                use_bias_correction=train.prodigy_use_bias_correction,
                safeguard_warmup=train.prodigy_safeguard_warmup,
            )
    elif train.optimizer == "schedulefree":
        from schedulefree import AdamWScheduleFree

        schedule_free = AdamWScheduleFree(
            parameters,
            lr=train.learning_rate,
            betas=betas,
            eps=train.adam_epsilon,
            weight_decay=train.adam_weight_decay,
        )
        schedule_free.train()
        optimizer = schedule_free
    else:
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit(
            parameters,
            lr=train.learning_rate,
            betas=betas,
            eps=train.adam_epsilon,
            weight_decay=train.adam_weight_decay,
        )
    optimizer.param_groups[0]["param_names"] = [name for name, _ in named]
    return optimizer


def averaged(optimizer: torch.optim.Optimizer) -> dict[str, Tensor] | None:
    """Schedule-free's weights to evaluate and export, x = (y - (1 - beta1) z) / beta1 of the trained y; else None.

    Its own `eval` overwrites y, and `train` brings it back with rounding, so that a run that evaluates would go on
    elsewhere than one that does not.
    """
    (group,) = optimizer.param_groups
    if "weight_sum" not in group:
        return None
    beta1 = group["betas"][0]
    return {
        name: parameter.detach().lerp(optimizer.state[parameter]["z"], 1 - 1 / beta1)
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }

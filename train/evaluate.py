"""The held-out velocity loss: fixed clips, fixed noise, fixed timesteps, so that only the weights can move it."""

from collections.abc import Sequence

import torch
from diffusers import CogVideoXTransformer3DModel

from shared.variants import Conventions
from train.data import Dataset
from train.engine import EVERYTHING_RESIDENT, Engine
from train.forward import predict
from train.objective import clip_loss

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where on the schedule the loss is taken."""


@torch.no_grad()
def held_out_loss(
    transformer: CogVideoXTransformer3DModel,
    dataset: Dataset,
    conventions: Conventions,
    num_timesteps: int,
    engine: Engine = EVERYTHING_RESIDENT,
) -> float:
    """Mean over held-out clips and quantiles; the same numbers give the same bits. The adapter's dropout is off."""
    was_training = transformer.training
    transformer.eval()
    losses: list[float] = []
    for row in range(len(dataset.rows)):
        for quantile in QUANTILES:
            example = dataset.fixed_example(row, round(quantile * (num_timesteps - 1)))
            example = example.to(transformer.device, transformer.dtype)
            (prediction,) = predict(transformer, [example.model_input], conventions, engine)
            losses.append(float(clip_loss(prediction, example.target)))
    transformer.train(was_training)
    return mean(losses)


@torch.no_grad()
def base_held_out_loss(
    transformer: CogVideoXTransformer3DModel,
    dataset: Dataset,
    conventions: Conventions,
    num_timesteps: int,
    engine: Engine = EVERYTHING_RESIDENT,
) -> float:
    """The same without the adapter."""
    transformer.disable_adapters()
    try:
        return held_out_loss(transformer, dataset, conventions, num_timesteps, engine)
    finally:
        transformer.enable_adapters()


def mean(values: Sequence[float]) -> float:
    assert values, "no held-out clips"
    return sum(values) / len(values)

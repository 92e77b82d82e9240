"""The held-out velocity loss: fixed clips, fixed noise, fixed timesteps, so that only the weights can move it."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from diffusers import CogVideoXTransformer3DModel

from shared.variants import Conventions
from train.data import Dataset
from train.engine import EVERYTHING_RESIDENT, Engine
from train.forward import predict
from train.objective import clip_loss
from train.peers import gather, place, together

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where on the schedule the loss is taken."""

Stopped = Callable[[], bool]


def never() -> bool:
    """No signal can come."""
    return False


def held_out_loss(
    transformer: CogVideoXTransformer3DModel,
    dataset: Dataset,
    conventions: Conventions,
    num_timesteps: int,
    engine: Engine = EVERYTHING_RESIDENT,
    stopped: Stopped = never,
) -> float | None:
    """Mean over held-out clips and quantiles; None if `stopped` said so in some process. The adapter's dropout is off.

    The processes take turns, a clip each, and meet after it: no one waits for longer than a clip, nor works on after a
    signal. The sum goes by the clips' order, so that the number of processes leaves no trace in it.
    """
    rank, world_size = place()

    def turn(row: int) -> list[float]:
        if row >= len(dataset.rows):
            return []
        return clip_losses(transformer, dataset, row, conventions, num_timesteps, engine)

    was_training = transformer.training
    transformer.eval()
    losses: list[float] = []
    try:
        for first in range(0, len(dataset.rows), world_size):
            everyone = gather((together(partial(turn, first + rank)), stopped()))
            if any(stopping for _, stopping in everyone):
                return None
            losses += [loss for theirs, _ in everyone for loss in theirs]
    finally:
        transformer.train(was_training)
    return mean(losses)


@torch.no_grad()
def clip_losses(
    transformer: CogVideoXTransformer3DModel,
    dataset: Dataset,
    row: int,
    conventions: Conventions,
    num_timesteps: int,
    engine: Engine,
) -> list[float]:
    """Of one clip at each quantile; the same numbers give the same bits."""
    losses: list[float] = []
    for quantile in QUANTILES:
        example = dataset.fixed_example(row, round(quantile * (num_timesteps - 1)))
        example = example.to(transformer.device, transformer.dtype)
        (prediction,) = predict(transformer, [example.model_input], conventions, engine)
        losses.append(float(clip_loss(prediction, example.target)))
    return losses


def base_held_out_loss(
    transformer: CogVideoXTransformer3DModel,
    dataset: Dataset,
    conventions: Conventions,
    num_timesteps: int,
    engine: Engine = EVERYTHING_RESIDENT,
    stopped: Stopped = never,
) -> float | None:
    """The same without the adapter."""
    transformer.disable_adapters()
    try:
        return held_out_loss(transformer, dataset, conventions, num_timesteps, engine, stopped)
    finally:
        transformer.enable_adapters()


def mean(values: Sequence[float]) -> float:
    assert values, "no held-out clips"
    return sum(values) / len(values)

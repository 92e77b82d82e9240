"""The held-out velocity loss: fixed clips, fixed noise, fixed timesteps, so that only the weights can move it."""

from collections.abc import Callable
from functools import partial

import torch

from train.distributed import gather, place, together
from train.objective import clip_loss
from train.run import Run
from train.transformer.forward import predict

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where on the schedule the loss is taken."""


def held_out_loss(run: Run, stopped: Callable[[], bool]) -> float | None:
    """Mean over held-out clips and quantiles; None if `stopped` said so in some process. The adapter's dropout is off.

    The processes take turns, a clip each, and meet after it: no one waits for longer than a clip, nor works on after a
    signal. The sum goes by the clips' order, so that the number of processes leaves no trace in it.
    """
    rank, world_size = place()
    num_clips = len(run.held_out.rows)
    was_training = run.transformer.training
    run.transformer.eval()
    losses: list[float] = []
    try:
        for first in range(0, num_clips, world_size):
            mine = range(first + rank, min(first + rank + 1, num_clips))  # one clip, or none
            everyone = gather((together(partial(clip_losses, run, mine)), stopped()))
            if any(stopping for _, stopping in everyone):
                return None
            losses += [loss for theirs, _ in everyone for loss in theirs]
    finally:
        run.transformer.train(was_training)
    return sum(losses) / len(losses)


@torch.no_grad()
def clip_losses(run: Run, rows: range) -> list[float]:
    """Of held-out clips at each quantile; the same numbers give the same bits."""
    losses: list[float] = []
    for row in rows:
        for quantile in QUANTILES:
            example = run.held_out.fixed_example(row, round(quantile * (len(run.schedule) - 1)))
            example = example.to(run.transformer.device, run.transformer.dtype)
            (prediction,) = predict(run.transformer, [example.model_input], run.conventions, run.engine)
            losses.append(float(clip_loss(prediction, example.target)))
    return losses


def base_held_out_loss(run: Run, stopped: Callable[[], bool]) -> float | None:
    """The same without the adapter."""
    run.transformer.disable_adapters()
    try:
        return held_out_loss(run, stopped)
    finally:
        run.transformer.enable_adapters()

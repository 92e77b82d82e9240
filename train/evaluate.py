"""The held-out velocity loss on fixed clips, noise and timesteps, so that only the weights change it."""

from collections.abc import Callable
from functools import partial

import torch

from train.distributed import all_gather, on_all_ranks, rank_and_world_size
from train.objective import clip_loss
from train.run import Run
from train.transformer.forward import predict

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Timesteps as fractions of the schedule."""
Cells = list[list[float]]
"""Losses [clips][quantiles]."""


def held_out_loss(run: Run, stopped: Callable[[], bool], *, base: bool = False) -> tuple[float, Cells] | None:
    """Return the mean over held-out clips and quantiles and its cells, without the adapter's dropout; a collective.

    `base` leaves the adapter out. None if `stopped` is true on a rank. Each rank takes every `world_size`-th clip, and
    all ranks meet after a clip, so that a signal is seen within one clip. Losses are summed in the clips' order: the
    number of processes does not change the result.
    """
    rank, world_size = rank_and_world_size()
    num_clips = len(run.held_out.rows)
    was_training = run.transformer.training
    run.transformer.eval()
    if base:
        run.transformer.disable_adapters()
    cells: Cells = []
    try:
        for first in range(0, num_clips, world_size):
            rows = range(first + rank, min(first + rank + 1, num_clips))  # one clip, or none
            gathered = all_gather((on_all_ranks(partial(clip_losses, run, rows)), stopped()))
            if any(stopping for _, stopping in gathered):
                return None
            cells += [losses for part, _ in gathered for losses in part]
    finally:
        run.transformer.train(was_training)
        if base:
            run.transformer.enable_adapters()
    return sum(loss for losses in cells for loss in losses) / (num_clips * len(QUANTILES)), cells


@torch.no_grad()
def clip_losses(run: Run, rows: range) -> Cells:
    """Return the loss of each held-out clip at each quantile; deterministic."""
    cells: Cells = []
    for row in rows:
        cells.append([])
        for quantile in QUANTILES:
            example = run.held_out.fixed_example(row, round(quantile * (len(run.schedule) - 1)))
            example = example.to(run.transformer.device, run.transformer.dtype)
            (prediction,) = predict(run.transformer, [example.model_input], run.conventions, run.engine)
            cells[-1].append(float(clip_loss(prediction, example.target)))
    return cells

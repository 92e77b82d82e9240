"""Weights to evaluate and export that are not the trained ones: an average over the steps, swapped in exactly."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Named = Sequence[tuple[str, nn.Parameter]]


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

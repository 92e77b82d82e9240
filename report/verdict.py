"""The verdict on a run: a stated rule on the held-out losses of the adapter and of the base model.

All evaluations use the same clips, noise and timesteps, so losses are compared pairwise: only the weights can move
them. A difference counts when it is larger than its noise: the 95 % margin of its mean over the held-out clips
(Student's t), or over the last evaluations if that is smaller. The first asks whether other clips would gain too, and
is wide when the clips gain unequally; the second asks whether these clips' mean gain comes and goes with the steps.
With fewer than three held-out clips the unit is one clip at one timestep quantile.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Kind = Literal["learning", "flat", "overfitting", "worse than the base", "too noisy to say", "not evaluated"]

FLAT_SHARE = 0.02
"""Of the base model's loss: a smaller margin around no gain is called flat, a larger one too noisy to say."""
LEAST_SHARE = 0.005
"""Of the base model's loss: a smaller gain or loss is called flat, however sure."""
LOST_SHARE = 0.1
"""Of the best gain: a smaller loss after the best evaluation is not called overfitting."""
LAST_EVALUATIONS = 5
"""Evaluations whose scatter is measured; at least three are needed."""
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Two-sided 95 % quantiles of Student's t with 1, 2, ... degrees of freedom; 2 beyond."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The held-out losses of one evaluation."""

    step: int
    cells: tuple[tuple[float, ...], ...]
    """[clips][timestep quantiles] velocity losses."""

    @property
    def mean(self) -> float:
        """Mean over clips and quantiles."""
        return float(np.mean(self.cells))

    @property
    def by_quantile(self) -> tuple[float, ...]:
        """Mean over clips at each timestep quantile."""
        return tuple(np.mean(self.cells, axis=0).tolist())

    @property
    def by_clip(self) -> tuple[float, ...]:
        """Mean over quantiles of each clip."""
        return tuple(np.mean(self.cells, axis=1).tolist())


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgment of a run by its held-out losses."""

    kind: Kind
    sentence: str
    best_step: int | None = None
    since_step: int | None = None
    """The step since which it overfits or is worse than the base model."""
    gain: float | None = None
    """Base loss minus held-out loss at the last evaluation."""
    noise: float | None = None
    """95 % margin of the gain."""


def judge(base: HeldOut | None, evaluations: Sequence[HeldOut]) -> Verdict:
    """Return the verdict of the rule in `RULE` on a run's evaluations, oldest first."""
    if base is None or not evaluations:
        return Verdict("not evaluated", "No held-out clips were evaluated; set data.held_out_clips to judge the run.")
    gains = noisy_gains(base, evaluations)
    last, best = len(gains) - 1, max(range(len(gains)), key=lambda index: gains[index][0])
    gain, noise = gains[last]
    least = LEAST_SHARE * base.mean
    numbers = f"{evaluations[last].mean:.4f} held out, {base.mean:.4f} without the adapter"

    def verdict(kind: Kind, sentence: str, since_step: int | None = None) -> Verdict:
        return Verdict(kind, sentence, evaluations[best].step, since_step, gain, noise)

    if not math.isfinite(gain) or gain < -max(noise, least):
        first = last
        while first and not gains[first - 1][0] >= -max(gains[first - 1][1], least):
            first -= 1
        since = evaluations[first].step
        sentence = f"Worse than the base model since step {since}: {numbers}."
        return verdict("worse than the base", sentence, since)
    lost, lost_noise = difference(evaluations[last], evaluations[best])
    spread = scatter(base, evaluations)
    lost_noise, best_noise = min(lost_noise, spread), min(gains[best][1], spread)
    if gains[best][0] > 2 * max(best_noise, least) and lost > max(lost_noise, LOST_SHARE * gains[best][0]):
        since = evaluations[best].step
        sentence = (
            f"Overfitting since step {since}, where the held-out loss was {evaluations[best].mean:.4f}: {numbers}."
        )
        return verdict("overfitting", sentence, since)
    if gain > max(noise, least):
        return verdict("learning", f"Learning: {numbers}, gain {gain:.4f} ± {noise:.4f}.")
    if noise < FLAT_SHARE * base.mean:
        return verdict("flat", f"Flat: no gain over the base model beyond ± {max(noise, least):.4f}: {numbers}.")
    sentence = f"Too noisy to say: the margin of ± {noise:.4f} hides the gain; hold out more clips: {numbers}."
    return verdict("too noisy to say", sentence)


RULE = (
    "The gain is the base model's held-out loss minus the run's, paired by clip. Its noise is the 95 % margin of its "
    "mean over the held-out clips, or over the last five evaluations if that is smaller, and at least 0.5 % of the "
    "base loss. Worse: gain below minus noise. Overfitting: since the best evaluation, itself a gain beyond twice the "
    "noise of then or of the end (it was picked among several), the loss rose by more than noise and more than 10 % "
    "of the best gain. "
    "Learning: gain above noise. Flat: no gain and noise below 2 % of the base loss. Otherwise too noisy to say."
)


def noisy_gains(base: HeldOut, evaluations: Sequence[HeldOut]) -> list[tuple[float, float]]:
    """Return the gain over the base model and its noise at each evaluation."""
    gains = []
    for number, evaluation in enumerate(evaluations, 1):
        gain, margin = difference(base, evaluation)
        gains.append((gain, min(margin, scatter(base, evaluations[:number]))))
    return gains


def difference(before: HeldOut, after: HeldOut) -> tuple[float, float]:
    """Return the mean of before - after over pairs, and its 95 % margin."""
    units = _units(before, after)
    if len(units) < 2:
        return float(units.mean()), math.inf
    return float(units.mean()), _margin(float(units.std(ddof=1)), len(units), len(units) - 1)


def scatter(base: HeldOut, evaluations: Sequence[HeldOut]) -> float:
    """Return the 95 % margin of the mean gain by what clips gain more or less than usual from evaluation to evaluation.

    The residual of a two-way table, clips by the last evaluations, without the means of both.
    """
    table = np.stack([_units(base, one) for one in evaluations[-LAST_EVALUATIONS:]])
    times, clips = table.shape
    if times < 3 or clips < 2:
        return math.inf
    residual = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
    degrees = (times - 1) * (clips - 1)
    found = _margin(math.sqrt(float((residual**2).sum()) / degrees), clips, degrees)
    return found if math.isfinite(found) else math.inf


def _units(before: HeldOut, after: HeldOut) -> "np.ndarray[Any, np.dtype[np.float64]]":
    pairs = np.subtract(before.cells, after.cells)
    return pairs.mean(axis=1) if len(pairs) >= 3 else pairs.flatten()


def _margin(deviation: float, count: int, degrees: int) -> float:
    t = T_95[degrees - 1] if degrees <= len(T_95) else 2.0
    return t * deviation / math.sqrt(count)

"""The verdict's rule on made curves with known answers."""

import numpy as np
import pytest

from report.verdict import HeldOut, judge

CURVES = {
    "learning": [0.0, 0.1, 0.18, 0.22, 0.25, 0.26],
    "overfitting": [0.0, 0.15, 0.25, 0.2, 0.12, 0.05],
    "worse than the base": [0.0, 0.02, -0.1, -0.2, -0.4, -0.6],
    "flat": [0.0, 0.001, -0.001, 0.0, 0.001, 0.0],
    "too noisy to say": [0.0, 0.01, 0.02, 0.01, 0.0, 0.01],
}
"""Kind -> the share of the base loss that each evaluation gains."""
NOISE = {"too noisy to say": 0.3, "flat": 0.002}
"""Spread of the gain over clips; 0.02 for the other kinds."""


def curve(kind: str, seed: int) -> tuple[HeldOut, list[HeldOut]]:
    """Return a base evaluation and six later ones; clips differ far more from each other than an adapter moves them."""
    draws = np.random.default_rng(seed)
    clips = int(draws.integers(4, 24))
    levels = draws.uniform(0.2, 1.5, (clips, 1)) * np.array([[1.6, 1.2, 0.8, 0.6, 0.5]])
    spread = NOISE.get(kind, 0.02)
    evaluations = []
    for number, gain in enumerate(CURVES[kind]):
        moved = levels * (1 - gain - spread * draws.standard_normal((clips, 1)))
        evaluations.append(HeldOut(100 * (number + 1), tuple(map(tuple, moved.tolist()))))
    return HeldOut(0, tuple(map(tuple, levels.tolist()))), evaluations


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", CURVES)
def test_made_curve_gets_its_verdict(kind: str, seed: int) -> None:
    base, evaluations = curve(kind, seed)
    assert judge(base, evaluations).kind == kind


def test_unequal_clips_that_keep_their_gain_are_learning() -> None:
    """Two of four held-out clips show what is learned, as in the demo: unequal, but at every evaluation."""
    levels = np.full((4, 5), 0.3) + np.array([[0.3], [-0.1], [-0.1], [0.0]])
    shares = np.array([[0.57], [0.01], [0.1], [0.56]])
    evaluations = [
        HeldOut(step, tuple(map(tuple, (levels * (1 - shares * reached)).tolist())))
        for step, reached in ((20, 0.8), (40, 0.95), (60, 1.0), (80, 1.01))
    ]
    base = HeldOut(0, tuple(map(tuple, levels.tolist())))
    assert judge(base, evaluations[:1]).kind == "too noisy to say"
    assert judge(base, evaluations).kind == "learning"


def test_overfitting_is_dated_by_the_best_evaluation() -> None:
    base, evaluations = curve("overfitting", 1)
    verdict = judge(base, evaluations)
    assert verdict.since_step == verdict.best_step == 300
    assert "since step 300" in verdict.sentence


def test_no_evaluation_is_not_a_zero() -> None:
    verdict = judge(None, [])
    assert verdict.kind == "not evaluated" and verdict.gain is None


def test_one_cell_is_too_noisy_to_say() -> None:
    assert judge(HeldOut(0, ((1.0,),)), [HeldOut(10, ((0.5,),))]).kind == "too noisy to say"


def test_diverged_run_is_worse_than_the_base() -> None:
    base, evaluations = curve("learning", 0)
    lost = HeldOut(700, tuple((float("nan"),) * 5 for _ in base.cells))
    assert judge(base, [*evaluations, lost]).kind == "worse than the base"

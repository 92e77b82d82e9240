"""Measures of a clip's thumbnails: motion, cuts, black pictures and borders, and a descriptor that finds duplicates.

Thumbnails are uint8 [F,3,h,w], one pixel for each latent pixel, so noise of the source is averaged away: a level is
1/255 of the full range of 8 x 8 pixels of four frames. All rules are the same for every data set.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

Array = np.ndarray

BLACK = 20.0
"""Levels; a darker pixel is black, as a fade to black in video range is."""
BAR, BAR_SHARE = 8.0, 0.04
"""Levels below which a bar is black at every time, and its least share of height or width; night scenes are lighter."""
STILL = 2.5
"""Levels that 1 % of the pixels must change by between two latent frames, or nothing moves."""
CUT_LEVELS, CUT_RATIO = 14.0, 1.45
"""A cut changes the coarse picture by so much, and by so many times what two usual steps of the clip do."""
CUT_CELLS, CUT_SHARE = 8.0, 0.6
"""Levels by which so large a share of the coarse picture changes; an object that moves leaves its ground alone."""
CUT_CORRELATION = 0.6
"""Pictures on both sides of a cut correlate less, shifted by up to a third too; those of a moving camera more."""
GRID = 16
"""Rows and columns of a descriptor, at four times of the clip."""
NEAR = 0.985
"""Cosine of the descriptors above which two clips are compared picture by picture."""
SAME_LEVELS = 5.0
"""Levels by which duplicates differ through encoding; what moves within a latent frame comes on top."""
NEIGHBORS = 20
"""Nearest earlier clips that a clip is compared with."""
BLOCK = 2048
"""Clips whose descriptors are compared at once."""


@dataclass(frozen=True, slots=True)
class ClipMeasures:
    """The measures of one clip."""

    motion: float
    """Mean absolute difference of brightness between latent frames, in levels; 0 for one frame."""
    moves: bool
    cuts: tuple[int, ...]
    """Latent frames that begin another scene."""
    brightness: float
    """Mean, in levels."""
    contrast: float
    """Standard deviation of brightness, in levels."""
    saturation: float
    """Mean difference between the largest and the smallest color channel, in levels."""
    black: float
    """Share of latent frames that are black."""
    border: float
    """Share of the height or width that black bars on opposite sides take; 0 without bars."""


def measure(thumbnails: Array) -> ClipMeasures:
    """Return the measures of uint8 thumbnails [F,3,h,w]."""
    pictures = thumbnails.astype(np.float32)
    luma = pictures.mean(1)
    changes = np.abs(np.diff(luma, axis=0))
    black = np.percentile(pictures.max(1).reshape(len(pictures), -1), 98, axis=1) < BLACK
    return ClipMeasures(
        motion=float(changes.mean()) if len(changes) else 0.0,
        moves=bool(len(changes) and np.percentile(changes.reshape(len(changes), -1), 99, axis=1).max() > STILL),
        cuts=_cuts(pictures),
        brightness=float(luma.mean()),
        contrast=float(luma.std()),
        saturation=float((pictures.max(1) - pictures.min(1)).mean()),
        black=float(black.mean()),
        border=0.0 if black.all() else _border(pictures),
    )


def _pooled(pictures: Array, size: tuple[int, int]) -> Array:
    """Average pictures [F,3,h,w] over a coarser grid."""
    pooled = F.adaptive_avg_pool2d(torch.from_numpy(pictures), size)
    return np.asarray(pooled)


def _cuts(pictures: Array) -> tuple[int, ...]:
    """Return the frames that begin another scene, from coarse pictures, which a camera's movement changes little."""
    height, width = pictures.shape[2:]
    coarse = _pooled(pictures, (min(6, height), min(8, width)))
    fine = _pooled(pictures, (min(12, height), min(18, width)))
    found: list[int] = []
    steps = np.abs(np.diff(coarse, axis=0)).mean((1, 2, 3))
    for frame in range(1, len(coarse)):
        # The cut may lie inside a latent frame, which then blends both scenes: look past it.
        after = min(frame + 1, len(coarse) - 1)
        changes = np.abs(coarse[after] - coarse[frame - 1]).mean(0)
        change, share = float(changes.mean()), float((changes > CUT_CELLS).mean())
        usual = np.delete(steps, slice(max(0, frame - 2), frame + 2))
        typical = float(np.median(usual)) if len(usual) else 0.0
        largest = steps[frame - 1] == steps[max(0, frame - 3) : frame + 2].max()
        large = change > max(CUT_LEVELS, CUT_RATIO * 2 * typical) and share > CUT_SHARE
        if largest and large and _shifted_correlation(fine[frame - 1], fine[after]) < CUT_CORRELATION:
            found.append(frame)
    return tuple(found)


def _shifted_correlation(left: Array, right: Array) -> float:
    """Return the highest correlation of two pictures [3,h,w], one shifted by up to a third as by a moving camera."""
    height, width = left.shape[1:]
    best = -1.0
    for down in range(-(height // 3), height // 3 + 1):
        for across in range(-(width // 3), width // 3 + 1):
            part = left[:, max(0, down) : height + min(0, down), max(0, across) : width + min(0, across)]
            other = right[:, max(0, -down) : height + min(0, -down), max(0, -across) : width + min(0, -across)]
            best = max(best, _correlation(part, other))
    return best


def _correlation(left: Array, right: Array) -> float:
    """Return the correlation of two pictures, their mean colors left out."""
    a, b = (picture - picture.mean((1, 2), keepdims=True) for picture in (left, right))
    scale = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / scale if scale > 1e-6 else 1.0


def _border(pictures: Array) -> float:
    """Return the larger share of black bars on two opposite sides, equally black in every frame."""
    lightest = pictures.max((0, 1))
    best = 0.0
    for lines in (lightest.max(1), lightest.max(0)):
        dark = lines < BAR
        first = int(np.argmin(dark)) if not dark.all() else 0
        last = int(np.argmin(dark[::-1])) if not dark.all() else 0
        inside = lines[first : len(lines) - last]
        if min(first, last) and max(first, last) <= 2 * min(first, last) + 1 and inside.mean() > 4 * BAR:
            best = max(best, (first + last) / len(lines))
    return best if best >= 2 * BAR_SHARE else 0.0


def describe(thumbnails: Array) -> Array:
    """Return the clip as uint8 [4,3,GRID,GRID]: four times, evenly spread, on one grid for every size and length."""
    times = np.linspace(0, len(thumbnails) - 1, 4)
    low, share = np.floor(times).astype(int), (times % 1)[:, None, None, None].astype(np.float32)
    high = np.minimum(low + 1, len(thumbnails) - 1)
    pictures = (1 - share) * thumbnails[low] + share * thumbnails[high]
    return _pooled(pictures.astype(np.float32), (GRID, GRID)).round().astype(np.uint8)


def duplicates(descriptors: Array) -> list[tuple[int, int, float]]:
    """Return (clip, earlier clip that it repeats, cosine) for descriptors uint8 [N,4,3,GRID,GRID].

    Cosines of pooled, centered descriptors find candidates. A candidate is a duplicate if the two differ by less than
    encoding and half of what moves between the four times: clips of one scene differ by more.
    """
    count = len(descriptors)
    pooled = torch.from_numpy(descriptors).flatten(1, 2).float()
    vectors = F.avg_pool2d(pooled, 2).flatten(1)
    vectors = F.normalize(vectors - vectors.mean(1, keepdim=True), dim=1)
    found: list[tuple[int, int, float]] = []
    for start in range(0, count, BLOCK):
        block = vectors[start : start + BLOCK] @ vectors[: start + BLOCK].T
        cosines, earlier = block.tril(start - 1).topk(min(NEIGHBORS, block.shape[1]))
        for row, column in (cosines > NEAR).nonzero().tolist():
            clip, other = start + row, int(earlier[row, column])
            if (not found or found[-1][0] != clip) and _same(descriptors, clip, other):
                found.append((clip, other, round(float(cosines[row, column]), 4)))
    return found


def _same(descriptors: Array, one: int, other: int) -> bool:
    a, b = descriptors[one].astype(np.float32), descriptors[other].astype(np.float32)
    difference = np.abs(a - b)
    moved = np.abs(np.diff(a, axis=0))
    limit = SAME_LEVELS + 0.15 * float(np.percentile(moved, 99))
    return bool(np.percentile(difference, 99) < 2 * limit and difference.mean() < limit)


def unusual(values: Array, deviations: float = 6.0) -> Array:
    """Return which values lie beyond so many robust standard deviations (1.4826 MAD) of the median."""
    spread = 1.4826 * np.median(np.abs(values - np.median(values)))
    beyond: Array = np.abs(values - np.median(values)) > deviations * max(float(spread), 1e-6)
    return beyond

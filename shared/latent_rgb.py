"""A linear map from latents to colors, fitted to a cache's thumbnails: latents are shown without the VAE.

A latent pixel's color is a weighted sum of its channels. The map is kept with the view, in no hash.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shared.atomic_files import replacing

LatentRgb = tuple[tuple[float, ...], ...]
"""C rows of weights for red, green and blue in 0..255, and a row of offsets; for unscaled latents. Empty: no map."""

SHOWN_PIXELS = 480
"""Longest side of an enlarged picture; one latent pixel gets at most 8 pixels a side."""


def fit_latent_rgb(samples: Iterable[Mapping[str, Tensor]]) -> LatentRgb:
    """Fit the map by least squares to samples with `moments` and `thumbnails`; empty if there are none."""
    squares = products = torch.zeros(())
    for sample in samples:
        if "thumbnails" in sample:
            mean = sample["moments"].double().chunk(2)[0].flatten(1)
            known = torch.cat([mean, torch.ones_like(mean[:1])])
            colors = sample["thumbnails"].double().transpose(0, 1).flatten(1)
            squares = squares + known @ known.T
            products = products + known @ colors.T
    if not squares.ndim:
        return ()
    ridge = 1e-6 * squares.diagonal().mean() * torch.eye(len(squares))  # few pixels do not determine every channel
    weights = torch.linalg.solve(squares + ridge, products)
    return tuple(tuple(float(f"{value:.6g}") for value in row) for row in weights.tolist())


def latent_pictures(latents: Tensor, latent_rgb: LatentRgb) -> np.ndarray:
    """Return unscaled latents [F,C,H,W] as colors, uint8 [F,H,W,3]."""
    weights = torch.tensor(latent_rgb, dtype=torch.float32)
    colors = torch.einsum("fchw,cr->fhwr", latents.float(), weights[:-1]) + weights[-1]
    return np.asarray(colors.round().clamp(0, 255).byte())


def write_webp(path: Path, pictures: np.ndarray, seconds: float) -> Path:
    """Write uint8 [F,H,W,3], enlarged, as an animation that shows each picture for `seconds`."""
    frames, height, width = pictures.shape[:3]
    factor = min(8, max(1, SHOWN_PIXELS // max(height, width)))
    size = (factor * width, factor * height)
    first, *rest = [Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC) for picture in pictures]
    with replacing(path) as pending:
        first.save(
            pending,
            format="WEBP",
            save_all=frames > 1,
            append_images=rest,
            duration=round(1000 * seconds),
            loop=0,
            quality=85,
            method=0,
        )
    return path

"""The linear map from latents to colors."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence

from shared.latent_rgb import fit_latent_rgb, latent_pictures, write_webp


def test_a_linear_relation_is_found_and_shown() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(4, 3, generator=generator)
    samples = []
    for size in ((3, 4, 6), (1, 8, 8)):
        mean = torch.randn(4, *size, generator=generator)
        colors = torch.einsum("cfhw,cr->frhw", 20 * mean, weights) + 128
        moments = torch.cat([mean, torch.zeros_like(mean)])
        samples.append({"moments": moments, "thumbnails": colors.round().clamp(0, 255).byte()})
    found = fit_latent_rgb(samples)
    for sample in samples:
        shown = torch.from_numpy(latent_pictures(sample["moments"][:4].transpose(0, 1), found)).permute(0, 3, 1, 2)
        off = (shown.int() - sample["thumbnails"].int()).abs().float().mean()
        assert shown.shape == sample["thumbnails"].shape and off < 8
    assert fit_latent_rgb([{"moments": moments}]) == ()


def test_pictures_become_an_animation(tmp_path: Path) -> None:
    pictures = np.stack([np.full((4, 6, 3), level, np.uint8) for level in (0, 128, 255)])
    with Image.open(write_webp(tmp_path / "a.webp", pictures, 0.5)) as image:
        assert (image.size, len(list(ImageSequence.Iterator(image)))) == ((48, 32), 3)
        image.seek(2)
        assert np.asarray(image.convert("RGB")).min() > 250 and image.info["duration"] == 500
    with Image.open(write_webp(tmp_path / "one.webp", pictures[:1], 0.5)) as image:
        assert len(list(ImageSequence.Iterator(image))) == 1

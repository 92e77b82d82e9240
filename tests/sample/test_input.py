"""A video to start from is read as stage 1 reads it: from its first picture, as displayed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from sample.generate import read_starts
from sample.video import read_input
from shared.config import Precompute, Sampling
from tests.media import write_clip

SETTINGS = Precompute(cache="cache")
TIMES = [40 * number for number in range(30)]


def read(path: Path, size: tuple[int, int] = (48, 80), frames: int = 9) -> np.ndarray:
    return np.stack([np.asarray(picture, np.float32) for picture in read_input(path, frames, size, 8, SETTINGS)])


def test_a_late_or_turned_video_is_the_same_as_displayed(tmp_path: Path) -> None:
    write_clip(tmp_path / "plain.mp4", times=TIMES)
    write_clip(tmp_path / "late.mp4", times=[1400 + time for time in TIMES])
    write_clip(tmp_path / "turned.mp4", times=TIMES, rotation=90)
    plain = read(tmp_path / "plain.mp4")
    assert np.abs(np.diff(plain, axis=0)).mean((1, 2, 3)).min() > 0, "no picture comes twice"
    assert np.array_equal(read(tmp_path / "late.mp4"), plain)
    turned = read(tmp_path / "turned.mp4", (80, 48))
    assert np.abs(np.rot90(plain, 1, (1, 2)) - turned).mean() < 1


def test_a_picture_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (96, 64)).save(tmp_path / "first.jpg", exif=exif)
    config: Any = SimpleNamespace(sample=Sampling(images=(tmp_path / "first.jpg",)))
    conventions: Any = SimpleNamespace(image_to_video=True)
    ((start, _),) = read_starts(config, conventions, 1)
    assert start.image.size == (64, 96)

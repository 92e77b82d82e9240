"""Filmstrips: the thumbnails of many clips as one picture per hundred clips, a row each."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from shared.atomic_files import replacing

STRIPS_PER_SHEET = 100
STRIP_FRAMES = 6
"""Pictures of each clip, evenly spread."""
EMPTY = (128, 128, 128)
"""Color beside a picture of another shape; black would look like bars of the clip."""
FEW_CLIPS = 1500
"""Data sets up to this size get larger and finer pictures; 10,000 clips of a film take 18 MB."""


def cell_size(clips: int) -> tuple[int, int]:
    """Return width and height of a picture in pixels."""
    return (96, 64) if clips <= FEW_CLIPS else (48, 32)


def sheet_name(number: int) -> str:
    """Return the file name of a sheet."""
    return f"strips-{number:03}.webp"


def write_sheet(folder: Path, number: int, clips: Sequence[np.ndarray], cell: tuple[int, int]) -> None:
    """Write the strips of clips, uint8 [F,3,h,w], below one another."""
    width, height = cell
    sheet = Image.new("RGB", (STRIP_FRAMES * width, len(clips) * height), EMPTY)
    for row, clip in enumerate(clips):
        scale = min(width / clip.shape[3], height / clip.shape[2])
        size = max(1, round(scale * clip.shape[3])), max(1, round(scale * clip.shape[2]))
        for column, frame in enumerate(np.linspace(0, len(clip) - 1, STRIP_FRAMES).round().astype(int)):
            picture = Image.fromarray(np.ascontiguousarray(clip[frame].transpose(1, 2, 0))).resize(size)
            place = column * width + (width - size[0]) // 2, row * height + (height - size[1]) // 2
            sheet.paste(picture, place)
    with replacing(folder / sheet_name(number)) as pending:
        sheet.save(pending, format="WEBP", quality=60 if width > 48 else 40, method=4)

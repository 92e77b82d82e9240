"""Filmstrips: the thumbnails of many clips as one picture per hundred clips, a row each."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from shared.atomic_files import replacing
from shared.config_file import load_config
from shared.errors import PrecogError

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


def write_held_out(folder: Path, run: Path, names: Sequence[str]) -> bool:
    """Write the strips of a run's held-out clips into `folder`, from the cache, unless they are there.

    False if the cache cannot be read or holds out other clips than `names`.
    """
    if (folder / sheet_name(0)).exists():
        return True
    from shared.cache.collection import SampleReader  # imports torch, so once in a run
    from shared.cache.storage import open_storage
    from shared.cache.view import read_view

    with suppress(PrecogError, OSError):
        config = load_config(run / "config.toml")
        storage = open_storage(config.precompute.cache, local_cache_gib=config.precompute.local_cache_gib)
        view = read_view(storage, config.data.name)
        rows = view.split("held_out")
        if not names or [f"{row.source} at {row.start_seconds:.2f} s" for row in rows] != list(names):
            return False
        reader = SampleReader(storage, view.latents, {row.latent_key for row in rows}, whole_up_to_bytes=0)
        folder.mkdir(exist_ok=True)
        for first in reversed(range(0, len(rows), STRIPS_PER_SHEET)):  # the first one last: all are there if it is
            part = rows[first : first + STRIPS_PER_SHEET]
            clips = [reader.read_part(row.latent_key, "thumbnails").numpy() for row in part]
            write_sheet(folder, first // STRIPS_PER_SHEET, clips, cell_size(len(rows)))
        return True
    return False

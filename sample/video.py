"""Frames to files: an mp4 that plays everywhere, and a contact sheet to look at."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

LABEL_PIXELS = 14
MARGIN_PIXELS = 4


def write_mp4(path: Path, frames: np.ndarray, fps: int) -> Path:
    """uint8 [F,H,W,3] with even H and W -> H.264 at `path`, which appears whole or not at all."""
    pending = path.with_name(f".tmp-{path.name}")
    with av.open(str(pending), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "18"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return pending.replace(path)


def contact_sheet(videos: Sequence[tuple[str, np.ndarray]], columns: int = 8) -> Image.Image:
    """One row for each (label, uint8 [F,H,W,3]), with frames spread evenly over the video."""
    frames, height, width = videos[0][1].shape[:3]
    chosen = np.unique(np.linspace(0, frames - 1, min(columns, frames)).round().astype(int))
    row_height = LABEL_PIXELS + height + MARGIN_PIXELS
    sheet = Image.new("RGB", (len(chosen) * (width + MARGIN_PIXELS), len(videos) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (label, video) in enumerate(videos):
        draw.text((2, row * row_height), label, fill="black")
        for column, index in enumerate(chosen):
            place = (column * (width + MARGIN_PIXELS), row * row_height + LABEL_PIXELS)
            sheet.paste(Image.fromarray(video[index]), place)
    return sheet

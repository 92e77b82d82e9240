"""Write frames as an H.264 mp4, and as a contact sheet."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from shared.atomic_files import replacing

LABEL_PIXELS = 14
MARGIN_PIXELS = 4


def write_mp4(path: Path, frames: np.ndarray, fps: int) -> Path:
    """Write uint8 [F,H,W,3] with even H and W as H.264; `path` appears complete or not at all."""
    with replacing(path) as pending, av.open(str(pending), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "18"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def contact_sheet(videos: Sequence[tuple[str, np.ndarray]], columns: int = 8) -> Image.Image:
    """Draw one row per (label, uint8 [F,H,W,3] of any size), its frames spread evenly over the video."""
    rows = [_row(label, frames, columns) for label, frames in videos]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _row(label: str, video: np.ndarray, columns: int) -> Image.Image:
    frames, height, width = video.shape[:3]
    chosen = np.unique(np.linspace(0, frames - 1, min(columns, frames)).round().astype(int))
    size = (len(chosen) * (width + MARGIN_PIXELS), LABEL_PIXELS + height + MARGIN_PIXELS)
    row = Image.new("RGB", size, "white")
    ImageDraw.Draw(row).text((2, 0), label, fill="black")
    for column, index in enumerate(chosen):
        row.paste(Image.fromarray(video[index]), (column * (width + MARGIN_PIXELS), LABEL_PIXELS))
    return row

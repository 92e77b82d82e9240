"""Synthetic videos to encode."""

from pathlib import Path
from typing import Any

import av
import numpy as np


def write_corpus(folder: Path, count: int, height: int, width: int, frames: int) -> None:
    """Write `count` videos, with the text files of a data set."""
    folder.mkdir()
    for number in range(count):
        write_video(folder / f"{number:04}.mp4", number, height, width, frames)
    (folder / "prompts.txt").write_text("\n".join(f"clip {number}" for number in range(count)))
    (folder / "videos.txt").write_text("\n".join(f"{number:04}.mp4" for number in range(count)))


def write_video(path: Path, seed: int, height: int, width: int, frames: int) -> None:
    """Write a moving picture with enough detail that decoding takes time."""
    draws = np.random.default_rng(seed)
    picture = draws.integers(0, 256, (height // 4, width // 4 + frames, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("libx264", rate=12, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            view = np.ascontiguousarray(picture[:, 4 * index : 4 * index + width])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        out.mux(stream.encode(None))

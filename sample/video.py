"""Read videos: those written here, and those to start from; and the figures that compare two."""

from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps

from shared.errors import UsageError

THUMBNAIL_PIXELS = 160
"""Height of a frame on the contact sheet."""


def read_mp4(path: Path) -> np.ndarray:
    """Read the frames of a video written here, uint8 [F,H,W,3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def read_input(path: Path, num_frames: int, height: int, width: int, fps: int) -> list[Image.Image]:
    """Read the first frames of a video at `fps`, scaled and cropped in the middle.

    Raises `UsageError` if the file is no video or too short.
    """
    frames: list[Image.Image] = []
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                while len(frames) < num_frames and (frame.time or 0.0) * fps >= len(frames) - 1e-3:
                    picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
                    frames.append(ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC))
                if len(frames) == num_frames:
                    return frames
    except (OSError, av.error.FFmpegError, IndexError) as error:
        raise UsageError(f"sample.video: {path} cannot be read as a video ({error}); replace the file") from None
    found = f"{path} has {len(frames)} frames at {fps} fps, expected {num_frames}"
    raise UsageError(f"sample.video: {found}; lower sample.num_frames or sample.fps")


def compare(video: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Return the distance of a video from the base model's, and its saturation and motion; uint8 [F,H,W,3] each.

    distance: root mean square of the difference; saturation: mean of (max - min) / max over the channels; motion: mean
    absolute difference of neighboring frames. All are from 0 to 1.
    """
    shown, expected = video.astype(np.float32) / 255, base.astype(np.float32) / 255
    largest = shown.max(axis=-1)
    saturation = (largest - shown.min(axis=-1)) / np.maximum(largest, 1 / 255)
    return {
        "distance": float(np.sqrt(np.mean((shown - expected) ** 2))),
        "saturation": float(saturation.mean()),
        "motion": float(np.abs(np.diff(shown, axis=0)).mean()) if len(shown) > 1 else 0.0,
    }


def thumbnails(path: Path, columns: int = 8) -> np.ndarray:
    """Read `columns` frames of an mp4, spread evenly, no higher than a thumbnail."""
    video = read_mp4(path)
    chosen = video[np.unique(np.linspace(0, len(video) - 1, columns).round().astype(int))]
    scale = min(1.0, THUMBNAIL_PIXELS / video.shape[1])
    size = round(video.shape[2] * scale), round(video.shape[1] * scale)
    return np.stack([np.asarray(Image.fromarray(frame).resize(size)) for frame in chosen])

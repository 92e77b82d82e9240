"""Read videos: those written here, and those to start from; and the figures that compare two."""

from bisect import bisect_right
from pathlib import Path

import av
import numpy as np
from PIL import Image

from shared.config import Precompute
from shared.errors import UsageError
from shared.file_types import with_names
from shared.media.child import DecodeJob
from shared.media.picture import Scaled
from shared.media.pool import decode_pool
from shared.media.probe import Skipped

THUMBNAIL_PIXELS = 160
"""Height of a frame on the contact sheet."""


def read_mp4(path: Path) -> np.ndarray:
    """Read the frames of a video written here, uint8 [F,H,W,3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def read_input(
    path: Path, num_frames: int, bucket: tuple[int, int], fps: int, settings: Precompute
) -> list[Image.Image]:
    """Read the first frames of a video at `fps` as stage 1 does: as displayed, scaled and cropped in the middle.

    `bucket` is the height and width. Raises `UsageError` if the file is no video or too short.
    """
    with decode_pool(settings) as pool:
        (found,) = pool.probe_all([path])
        if isinstance(found, Skipped):
            raise UsageError(f"sample.video: {path}: {with_names(found.reason, path.name)}; replace the file")
        times, (height, width) = found.timestamps_us, found.probe.look.size
        wanted = [number * 1_000_000 // fps for number in range(num_frames)]
        if (there := sum(time < max(found.end_us, 1) for time in wanted)) < num_frames:
            short = f"{path} has {there} frames at {fps} fps, expected {num_frames}"
            raise UsageError(f"sample.video: {short}; lower sample.num_frames or raise sample.fps")
        indices = tuple(bisect_right(times, time + 1000) - 1 for time in wanted)  # containers round to 1 ms
        scale = max(bucket[0] / height, bucket[1] / width)
        size = max(bucket[0], round(height * scale)), max(bucket[1], round(width * scale))
        part = (size[0] - bucket[0]) // 2, (size[1] - bucket[1]) // 2, *bucket
        job = DecodeJob(
            path, found.probe, indices, tuple(times[index] for index in indices), "pyav", Scaled(size, part)
        )
        (decoded,) = pool.decode_all([job])
        if isinstance(decoded, Skipped):
            raise UsageError(f"sample.video: {path}: {with_names(decoded.reason, path.name)}; replace the file")
        return [Image.fromarray(frame.clip(0, 255).round().astype(np.uint8)) for frame in decoded.frames]


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

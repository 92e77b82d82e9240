"""Videos as stage 1 sees them: probed and decoded by its code, in processes that may be killed."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shared.errors import DataError
from shared.file_types import with_names
from shared.media.child import DecodeJob
from shared.media.picture import Scaled
from shared.media.pool import DecodePool
from shared.media.probe import Probed, Skipped

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SIDE = 768
"""Pixels of the longer side of a picture; more costs tokens and adds little to a caption."""


@dataclass(frozen=True, slots=True)
class VideoSummary:
    """The length and the displayed size of a video, by which buckets are chosen."""

    seconds: float
    height: int
    width: int

    def frames_at(self, fps: float) -> int:
        """Return the number of frames at `fps` frames per second."""
        return max(1, -int(-(self.seconds * fps - 0.05) // 1))


def probe(pool: DecodePool, path: Path) -> Probed:
    """Return the content of a file. Raises `DataError` where stage 1 would skip it."""
    (found,) = pool.probe_all([path])
    if isinstance(found, Skipped):
        raise DataError(with_names(found.reason, path.name))
    return found


def sample_frames(
    pool: DecodePool, path: Path, video: Probed, count: int, start: float | None, end: float | None
) -> list["Image"]:
    """Return `count` pictures, each displayed in the middle of one of `count` equal parts of the clip.

    Times are seconds from the container's origin. Raises `DataError` if a picture cannot be decoded.
    """
    from PIL import Image

    times, zero, last = video.timestamps_us, video.probe.start_us, video.end_us
    begins, ends = (None if time is None else round(time * 1e6) - zero for time in (start, end))
    first = min(max(0, begins or 0), last)
    last = max(first, last if ends is None else min(ends, last))
    wanted = [first + (last - first) * (part + 0.5) / count for part in range(count)]
    indices = [max(0, bisect_right(times, time) - 1) for time in wanted]
    height, width = video.probe.look.size
    shrink = min(1.0, MAX_SIDE / max(height, width))
    size = max(1, round(height * shrink)), max(1, round(width * shrink))

    def job(indices: Sequence[int]) -> DecodeJob:
        at = tuple(times[index] for index in indices)
        return DecodeJob(path, video.probe, tuple(indices), at, "pyav", Scaled(size, (0, 0, *size)))

    # Where each is reached from a keyframe, the frames between them are not decoded.
    jobs = [job([index]) for index in indices] if video.probe.one_to_one else [job(indices)]
    pictures: list[Image.Image] = []
    for decoded in pool.decode_all(jobs):
        if isinstance(decoded, Skipped):
            raise DataError(decoded.reason)
        pictures += [Image.fromarray(frame.clip(0, 255).round().astype(np.uint8)) for frame in decoded.frames]
    return pictures

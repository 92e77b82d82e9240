"""Time stamps and settings -> windows of frames, each with its bucket. Pure; nothing is decoded here.

Time is integer microseconds, `fps` the exact decimal number of the config, and all arithmetic integer or rational.
Containers round stamps to their time base (whole milliseconds in Matroska), so 24 fps reads 0, 42, 83, 125 ms and
the frame for 41.67 ms would seem not to have begun. Therefore a frame counts as displayed from `STAMP_SLACK_US` before
its stamp, in every comparison of a stamp with a time.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import ceil, floor
from statistics import median_low

from shared.config import Data
from shared.geometry import ENCODE_CHUNK_FRAMES, Bucket, choose_frames, choose_resolution, first_chunk_frames

MAX_UPSCALE = 2
"""No source is enlarged by more than this, in either direction; one without a bucket within reach is left out."""

STAMP_SLACK_US = 2000
"""Two roundings to a millisecond time base; at most half the median frame interval."""

_SECOND_US = 1_000_000


@dataclass(frozen=True, slots=True)
class Window:
    """What one stored clip shows; `flip` mirrors it horizontally."""

    indices: tuple[int, ...]
    """Source frame numbers, ascending; repeated where fps is above the source's."""
    timestamps_us: tuple[int, ...]
    """Time stamps of these frames in the source."""
    bucket: Bucket
    flip: bool


@dataclass(frozen=True, slots=True)
class Skipped:
    """Why a video gives no clip."""

    reason: str


def cut_windows(
    timestamps_us: Sequence[int],
    height: int,
    width: int,
    data: Data,
    *,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
) -> list[Window] | Skipped:
    """The windows of a video whose frames have these time stamps and this displayed size (rotation applied).

    1. `skip_frames_start/end` leave out source frames.
    2. `start_seconds <= t < end_seconds`, counted from the source's very first frame, leave out by time.
    3. `fps` > 0: output frame k shows the source frame displayed at t0 + k / fps, t0 being the first frame left. The
       last one is displayed for one median frame interval of the source, and not beyond `end_seconds`.
       `fps` = 0: every source frame is an output frame.
    4. The bucket's frames are the most that fit into the output frames and `max_num_frames`, its height and width those
       nearest in aspect ratio of the ones within `MAX_UPSCALE`; one window begins at the start.
    """
    if height <= 0 or width <= 0:
        return Skipped(f"no pixels: {height}x{width}")
    if not timestamps_us:
        return Skipped("no frames")
    back = next((i for i, (a, b) in enumerate(pairwise(timestamps_us), start=1) if b < a), None)
    if back is not None:
        return Skipped(f"time stamps go back at frame {back}")

    interval = median_low(b - a for a, b in pairwise(timestamps_us)) if len(timestamps_us) > 1 else 0
    slack = min(STAMP_SLACK_US, interval // 2)
    first = data.skip_frames_start
    stop = len(timestamps_us) - data.skip_frames_end
    if first >= stop:
        return Skipped(
            f"no frames left: {len(timestamps_us)} in the video, skip_frames_start = {data.skip_frames_start}, "
            f"skip_frames_end = {data.skip_frames_end}"
        )
    end_us = None
    if start_seconds is not None:
        start_us = timestamps_us[0] + _microseconds(start_seconds)
        first = bisect_left(timestamps_us, start_us - slack, first, stop)
    if end_seconds is not None:
        end_us = timestamps_us[0] + _microseconds(end_seconds)
        stop = bisect_left(timestamps_us, end_us - slack, first, stop)
    if first >= stop:
        length = (timestamps_us[-1] - timestamps_us[0] + interval) / _SECOND_US
        return Skipped(
            f"no frames between {start_seconds or 0:g} s and "
            f"{'the end' if end_seconds is None else f'{end_seconds:g} s'}: the video has {length:.2f} s"
        )

    num_frames, frame_at = _output_frames(timestamps_us, first, stop, interval, slack, end_us, data.fps)
    frames = choose_frames(min(num_frames, data.max_num_frames), data.frame_buckets)
    if frames is None:
        rate = f" at {data.fps:g} fps" if data.fps else ""
        plural = "" if num_frames == 1 else "s"
        return Skipped(f"too short: {num_frames} frame{plural}{rate}, the smallest bucket is {min(data.frame_buckets)}")

    resolution = _resolution(height, width, data)
    if isinstance(resolution, Skipped):
        return resolution
    bucket = Bucket(frames, *resolution)

    starts = window_starts(num_frames, frames, data.windows_per_clip, data.window_placement == "consecutive")
    # Two windows inside one long-held frame would be the same clip.
    distinct = dict.fromkeys(tuple(frame_at(start + k) for k in range(frames)) for start in starts)
    return [
        Window(indices, tuple(timestamps_us[index] for index in indices), bucket, flip)
        for indices in distinct
        for flip in ((False, True) if data.random_flip else (False,))
    ]


def window_starts(num_frames: int, frames: int, windows: int, consecutive: bool) -> list[int]:
    """First output frames of at most `windows` windows of `frames` out of `num_frames` >= `frames`.

    Consecutive ones do not overlap. Otherwise they are spread evenly from the first to the last possible start: apart
    when there is room, else overlapping by half at most, and fewer when that does not fit either.
    """
    assert 0 < frames <= num_frames
    if consecutive:
        return [index * frames for index in range(min(windows, num_frames // frames))]
    room = num_frames - frames
    windows = min(windows, 1 + room // -(-frames // 2))
    return [index * room // (windows - 1) if index else 0 for index in range(windows)]


def bucket_warnings(data: Data) -> list[str]:
    """One line for each frame bucket in use that makes the VAE's first encode chunk bigger than 8k+1 frames do."""
    usual = first_chunk_frames(ENCODE_CHUNK_FRAMES + 1)
    return [
        f"frame bucket {frames}: the VAE's first chunk has {first_chunk_frames(frames)} frames instead of {usual}, "
        f"which costs memory; {frames - frames % ENCODE_CHUNK_FRAMES + 1} would not"
        for frames in sorted(set(data.frame_buckets))
        if frames <= data.max_num_frames and first_chunk_frames(frames) > usual
    ]


def _output_frames(
    stamps: Sequence[int], first: int, stop: int, interval: int, slack: int, end_us: int | None, fps: float
) -> tuple[int, Callable[[int], int]]:
    """How many output frames the source frames [first, stop) give, and the source frame of the k-th."""
    if not fps:
        return stop - first, lambda k: first + k
    step = _SECOND_US / Fraction(str(fps))
    until = stamps[stop - 1] + interval
    if end_us is not None:
        until = min(until, end_us)
    count = max(1, ceil((until - slack - stamps[first]) / step))  # the k with t0 + k * step < until - slack

    def frame_at(k: int) -> int:
        return bisect_right(stamps, stamps[first] + floor(k * step) + slack, first, stop) - 1

    return count, frame_at


def _microseconds(seconds: float) -> int:
    return round(Fraction(str(seconds)) * _SECOND_US)


def _resolution(height: int, width: int, data: Data) -> tuple[int, int] | Skipped:
    """Height and width of the bucket, out of those within reach."""
    letterbox = data.video_reshape_mode == "letterbox"
    upscale = {size: _upscale((height, width), size, letterbox) for size in data.resolutions}
    within_reach = [size for size in upscale if upscale[size] <= MAX_UPSCALE]
    if within_reach:
        return choose_resolution(height, width, within_reach)
    nearest = min(upscale, key=lambda size: upscale[size])
    return Skipped(f"too few pixels: {height}x{width} for {nearest[0]}x{nearest[1]}")


def _upscale(source: tuple[int, int], bucket: tuple[int, int], letterbox: bool) -> Fraction:
    """Enlargement that makes the source (height, width) cover the bucket, or with `letterbox` fit into it."""
    scales = [Fraction(wanted, there) for wanted, there in zip(bucket, source, strict=True)]
    return min(scales) if letterbox else max(scales)

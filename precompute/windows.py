"""Time stamps and settings -> windows of frames, each with its bucket. Pure; nothing is decoded here.

Time is integer microseconds, `fps` the exact decimal number of the config, and all arithmetic integer or rational.
Containers round stamps to their time base (whole milliseconds in Matroska): 24 fps reads 0, 42, 83, 125 ms, and at
41.67 ms the second frame would not have begun. Every comparison of a stamp with a time therefore counts a frame as
displayed from `STAMP_SLACK_US` before its stamp.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil

import numpy as np

from shared.config import Data
from shared.media.probe import Skipped
from shared.model.geometry import MAX_UPSCALE, Bucket, choose_frames, choose_resolution

STAMP_SLACK_US = 2000
"""Two roundings to a millisecond time base; at most half the median frame interval."""
_SECOND_US = 1_000_000


@dataclass(frozen=True, slots=True)
class Timeline:
    """`num_frames` output frames, made of the source frames [`first`, `stop`)."""

    stamps_us: Sequence[int]
    first: int
    stop: int
    slack_us: int
    step_us: Fraction | None
    """From one output frame to the next; None where every source frame is an output frame."""
    num_frames: int

    def frame_at(self, number: int) -> int:
        """Return the source frame that output frame `number` shows."""
        if self.step_us is None:
            return self.first + number
        time_us = self.stamps_us[self.first] + number * self.step_us.numerator // self.step_us.denominator  # its floor
        return bisect_right(self.stamps_us, time_us + self.slack_us, self.first, self.stop) - 1


@dataclass(frozen=True, slots=True)
class Window:
    """The frames of one stored clip; `flip` mirrors them horizontally."""

    indices: tuple[int, ...]
    """Source frame numbers, ascending; repeated where fps is above the source's."""
    timestamps_us: tuple[int, ...]
    """Time stamps of these frames in the source."""
    bucket: Bucket
    flip: bool


def cut_windows(
    timestamps_us: Sequence[int],
    height: int,
    width: int,
    data: Data,
    *,
    start_us: int = 0,
    end_us: int = 0,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
) -> list[Window] | Skipped:
    """Return the windows of a video with these time stamps and this displayed size.

    `start_us` and `end_us` are `Probe`'s.

    The bucket has the most frames that fit into the `timeline` and `max_num_frames`, and the height and width nearest
    in aspect ratio among those within `MAX_UPSCALE`. One window begins at the start.
    """
    if height <= 0 or width <= 0:
        return Skipped(f"no pixels: {height}x{width}")
    timeline = lay_out(timestamps_us, data, start_seconds, end_seconds, start_us, end_us)
    if isinstance(timeline, Skipped):
        return timeline
    frames = choose_frames(min(timeline.num_frames, data.max_num_frames), data.frame_buckets)
    if frames is None:
        found = f"{timeline.num_frames} frame{'' if timeline.num_frames == 1 else 's'}"
        rate = f" at {data.fps:g} fps" if data.fps else ""
        return Skipped(f"too short: {found}{rate}, the smallest bucket is {min(data.frame_buckets)}")
    resolution = _resolution(height, width, tuple(data.resolutions), data.video_reshape_mode == "letterbox")
    if isinstance(resolution, Skipped):
        return resolution

    consecutive = data.window_placement == "consecutive"
    starts = window_starts(timeline.num_frames, frames, data.windows_per_clip, consecutive)
    # Two windows inside one long-held frame would be the same clip.
    distinct = dict.fromkeys(tuple(timeline.frame_at(start + k) for k in range(frames)) for start in starts)
    return [
        Window(indices, tuple(timestamps_us[index] for index in indices), Bucket(frames, *resolution), flip)
        for indices in distinct
        for flip in ((False, True) if data.random_flip else (False,))
    ]


def window_starts(num_frames: int, frames: int, windows: int, consecutive: bool) -> list[int]:
    """Return the first output frames of at most `windows` windows of `frames` out of `num_frames` >= `frames`.

    Consecutive windows do not overlap. Others are spread evenly from the first to the last possible start. They overlap
    by half at most, and only where `windows` do not fit side by side; if that is not enough there are fewer.
    """
    assert 0 < frames <= num_frames
    if consecutive:
        return [index * frames for index in range(min(windows, num_frames // frames))]
    room = num_frames - frames
    windows = min(windows, 1 + room // -(-frames // 2))
    return [index * room // (windows - 1) if index else 0 for index in range(windows)]


@lru_cache(4096)
def _resolution(
    height: int, width: int, resolutions: tuple[tuple[int, int], ...], letterbox: bool
) -> tuple[int, int] | Skipped:
    """Return height and width of the nearest bucket within `MAX_UPSCALE`."""
    upscale = {size: _upscale((height, width), size, letterbox) for size in resolutions}
    within_reach = [size for size in upscale if upscale[size] <= MAX_UPSCALE]
    if within_reach:
        return choose_resolution(height, width, within_reach)
    nearest = min(upscale, key=lambda size: upscale[size])
    return Skipped(f"too few pixels: {height}x{width} for {nearest[0]}x{nearest[1]}")


def _upscale(source: tuple[int, int], bucket: tuple[int, int], letterbox: bool) -> Fraction:
    """Return the enlargement that makes the source (height, width) cover the bucket, or fit into it for letterbox."""
    scales = [Fraction(wanted, there) for wanted, there in zip(bucket, source, strict=True)]
    return min(scales) if letterbox else max(scales)


def lay_out(
    stamps_us: Sequence[int],
    data: Data,
    start_seconds: float | None,
    end_seconds: float | None,
    video_start_us: int,
    video_end_us: int,
) -> Timeline | Skipped:
    """Return the output frames of a video with these time stamps, or the reason why there are none.

    1. `skip_frames_start/end` leave out source frames.
    2. `start_seconds <= t < end_seconds` leave out by time, counted as players do: the first frame is at
       `video_start_us`, which is not 0 where the sound starts earlier.
    3. `fps` > 0: output frame k shows the source frame displayed at t0 + k / fps, t0 being the first frame left. The
       last one is displayed until the next source frame, the video's own last one until `video_end_us` (for one median
       frame interval if that is 0), and not beyond `end_seconds`. `fps` = 0: every source frame is an output frame.
    """
    if not stamps_us:
        return Skipped("no frames")
    first, stop = data.skip_frames_start, len(stamps_us) - data.skip_frames_end
    if first >= stop:
        skips = f"skip_frames_start = {first}, skip_frames_end = {data.skip_frames_end}"
        return Skipped(f"no frames left: {len(stamps_us)} in the video, {skips}")

    interval = _median_interval(stamps_us)
    slack = min(STAMP_SLACK_US, interval // 2)
    last_end = stamps_us[0] + video_end_us if video_end_us else stamps_us[-1] + interval
    zero = stamps_us[0] - video_start_us
    end_us = None
    if start_seconds is not None:
        first = bisect_left(stamps_us, zero + _microseconds(start_seconds) - slack, first, stop)
    if end_seconds is not None:
        end_us = zero + _microseconds(end_seconds)
        stop = bisect_left(stamps_us, end_us - slack, first, stop)
    if first >= stop:
        end = "the end" if end_seconds is None else f"{end_seconds:g} s"
        shown = f"{-zero / _SECOND_US:.2f} s to {(last_end - zero) / _SECOND_US:.2f} s"
        return Skipped(f"no frames in its time: {start_seconds or 0:g} s to {end}, in a video of {shown}")

    if not data.fps:
        return Timeline(stamps_us, first, stop, slack, None, stop - first)
    step = _SECOND_US / Fraction(str(data.fps))
    until = stamps_us[stop] if stop < len(stamps_us) else last_end
    until = until if end_us is None else min(until, end_us)
    # As many k as have t0 + k * step < until - slack.
    return Timeline(stamps_us, first, stop, slack, step, max(1, ceil((until - slack - stamps_us[first]) / step)))


def _median_interval(stamps_us: Sequence[int]) -> int:
    """Return the lower median of the intervals, 0 for one frame; a film of hours is asked once per row."""
    stamps = np.asarray(stamps_us, np.int64)
    steps = stamps[1:] - stamps[:-1]
    return int(np.partition(steps, (len(steps) - 1) // 2)[(len(steps) - 1) // 2]) if len(steps) else 0


def _microseconds(seconds: float) -> int:
    return round(Fraction(str(seconds)) * _SECOND_US)

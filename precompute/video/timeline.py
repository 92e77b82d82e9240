"""Time stamps -> the output frames of a video, each with the source frame displayed then. Nothing is decoded here.

Time is integer microseconds, `fps` the exact decimal number of the config, and all arithmetic integer or rational.
Containers round stamps to their time base (whole milliseconds in Matroska): 24 fps reads 0, 42, 83, 125 ms, and at
41.67 ms the second frame would not have begun. Every comparison of a stamp with a time therefore counts a frame as
displayed from `STAMP_SLACK_US` before its stamp.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import ceil, floor
from statistics import median_low

from shared.config import Data

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
        time_us = self.stamps_us[self.first] + floor(number * self.step_us)
        return bisect_right(self.stamps_us, time_us + self.slack_us, self.first, self.stop) - 1


def lay_out(
    stamps_us: Sequence[int], data: Data, start_seconds: float | None, end_seconds: float | None
) -> Timeline | str:
    """Return the output frames of a video with these time stamps, or the reason why there are none.

    1. `skip_frames_start/end` leave out source frames.
    2. `start_seconds <= t < end_seconds`, counted from the source's very first frame, leave out by time.
    3. `fps` > 0: output frame k shows the source frame displayed at t0 + k / fps, t0 being the first frame left. The
       last one is displayed for one median frame interval of the source, and not beyond `end_seconds`.
       `fps` = 0: every source frame is an output frame.
    """
    if not stamps_us:
        return "no frames"
    back = next((i for i, (a, b) in enumerate(pairwise(stamps_us), start=1) if b < a), None)
    if back is not None:
        return f"time stamps go back: at frame {back}"
    first, stop = data.skip_frames_start, len(stamps_us) - data.skip_frames_end
    if first >= stop:
        skips = f"skip_frames_start = {first}, skip_frames_end = {data.skip_frames_end}"
        return f"no frames left: {len(stamps_us)} in the video, {skips}"

    interval = median_low(b - a for a, b in pairwise(stamps_us)) if len(stamps_us) > 1 else 0
    slack = min(STAMP_SLACK_US, interval // 2)
    end_us = None
    if start_seconds is not None:
        first = bisect_left(stamps_us, stamps_us[0] + _microseconds(start_seconds) - slack, first, stop)
    if end_seconds is not None:
        end_us = stamps_us[0] + _microseconds(end_seconds)
        stop = bisect_left(stamps_us, end_us - slack, first, stop)
    if first >= stop:
        length = (stamps_us[-1] - stamps_us[0] + interval) / _SECOND_US
        end = "the end" if end_seconds is None else f"{end_seconds:g} s"
        return f"no frames in its time: {start_seconds or 0:g} s to {end}, in a video of {length:.2f} s"

    if not data.fps:
        return Timeline(stamps_us, first, stop, slack, None, stop - first)
    step = _SECOND_US / Fraction(str(data.fps))
    until = stamps_us[stop - 1] + interval
    until = until if end_us is None else min(until, end_us)
    # As many k as have t0 + k * step < until - slack.
    return Timeline(stamps_us, first, stop, slack, step, max(1, ceil((until - slack - stamps_us[first]) / step)))


def _microseconds(seconds: float) -> int:
    return round(Fraction(str(seconds)) * _SECOND_US)

"""Time stamps and settings -> windows: tables, and an oracle that looks at one frame after the other."""

import time
from array import array
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from statistics import median_low
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precompute.windows import STAMP_SLACK_US, Window, cut_windows, window_starts
from shared.config import Data
from shared.media.probe import Skipped
from shared.model.geometry import Bucket

BASE = {"name": "test", "instance_data_root": ".", "fps": 0, "frame_buckets": [9, 17], "resolution_buckets": [[64, 96]]}
BASE |= {"allow_uneven_frame_buckets": True}


def make_data(**changes: Any) -> Data:
    return Data.model_validate(BASE | changes)


def steady(num_frames: int, fps: float, start_us: int = 0, unit_us: int = 1) -> list[int]:
    """Stamps of a constant rate, rounded to multiples of `unit_us` as a container would."""
    step = 1_000_000 / Fraction(str(fps))
    return [start_us + round(k * step / unit_us) * unit_us for k in range(num_frames)]


def result(
    stamps: Sequence[int], size: tuple[int, int], start: float | None = None, end: float | None = None, **changes: Any
) -> list[Window] | Skipped:
    return cut_windows(stamps, *size, make_data(**changes), start_seconds=start, end_seconds=end)


def cut(stamps: Sequence[int], source_height: int = 64, source_width: int = 96, **changes: Any) -> list[Window]:
    windows = result(stamps, (source_height, source_width), **changes)
    assert isinstance(windows, list), windows
    return windows


def reason(stamps: Sequence[int], source_height: int = 64, source_width: int = 96, **changes: Any) -> str:
    skipped = result(stamps, (source_height, source_width), **changes)
    assert isinstance(skipped, Skipped), skipped
    return skipped.reason


def test_without_fps_the_window_is_the_first_source_frames() -> None:
    stamps = steady(20, 24)
    [window] = cut(stamps)
    assert window == Window(tuple(range(17)), tuple(stamps[:17]), Bucket(17, 64, 96), flip=False)


@pytest.mark.parametrize(
    ("source_fps", "fps", "expected"),
    [
        (24, 8, (0, 3, 6, 9, 12, 15, 18, 21, 24)),
        (12, 8, (0, 1, 3, 4, 6, 7, 9, 10, 12)),
        (4, 8, (0, 0, 1, 1, 2, 2, 3, 3, 4)),
        (10, 8, (0, 1, 2, 3, 5, 6, 7, 8, 10)),
    ],
)
def test_fps_picks_the_frame_displayed_at_each_output_time(source_fps: float, fps: float, expected: object) -> None:
    [window] = cut(steady(100, source_fps), fps=fps, frame_buckets=[9])
    assert window.indices == expected


@pytest.mark.parametrize("fps", [8, 23.976, 24, 25, 29.97, 30, 59.94, 60])
def test_the_sources_own_fps_gives_every_frame_once(fps: float) -> None:
    """Also with stamps of a muxer that rounds down, and of a second one with a clock of its own."""
    rounded = [(stamp + 2_400) // 1000 * 1000 // 1001 * 1001 for stamp in steady(90, fps, 400)]
    for stamps in (steady(90, fps, 83_000), steady(90, fps, unit_us=1000), rounded):
        assert cut(stamps, fps=fps, frame_buckets=[90], max_num_frames=200)[0].indices == tuple(range(90))
        assert reason(stamps, fps=fps, frame_buckets=[91], max_num_frames=200).startswith("too short: 90 frames at ")


def test_fps_is_the_decimal_number_that_was_written() -> None:
    stamps = [k * 10_000_000 + STAMP_SLACK_US * (k > 0) for k in range(9)]
    assert cut(stamps, fps=0.1)[0].indices == tuple(range(9))


def displayed_frames(stamps: Sequence[int], first: int, stop: int, fps: float, end_us: int | None) -> list[int]:
    """Apply the rule of `lay_out` to one output frame after the other."""
    interval = median_low(b - a for a, b in pairwise(stamps))
    slack = min(STAMP_SLACK_US, interval // 2)
    until = stamps[stop] if stop < len(stamps) else stamps[-1] + interval
    until = until if end_us is None else min(until, end_us)
    frames: list[int] = []
    while not frames or stamps[first] + len(frames) * 1_000_000 / Fraction(str(fps)) < until - slack:
        time = stamps[first] + len(frames) * 1_000_000 / Fraction(str(fps))
        frames.append([i for i in range(first, stop) if stamps[i] - slack <= time][-1])
    return frames


@st.composite
def variable_rate(draw: st.DrawFn) -> list[int]:
    intervals = draw(st.lists(st.integers(1, 400_000), min_size=8, max_size=40))
    stamps = [draw(st.integers(-2_000_000, 2_000_000))]
    for interval in intervals:
        stamps.append(stamps[-1] + interval)
    return stamps


@settings(max_examples=100)
@given(
    variable_rate(),
    st.sampled_from([0.5, 1, 7.5, 8, 23.976, 30]),
    st.integers(0, 3),
    st.integers(0, 3),
    st.none() | st.floats(0, 10),
)
def test_a_variable_rate_gives_the_frame_displayed_at_each_time(
    stamps: list[int], fps: float, skip_start: int, skip_end: int, end: float | None
) -> None:
    settings_ = {"fps": fps, "frame_buckets": [3], "windows_per_clip": 10_000, "window_placement": "consecutive"}
    data = make_data(**settings_, skip_frames_start=skip_start, skip_frames_end=skip_end)
    windows = cut_windows(stamps, 64, 96, data, end_seconds=end)
    slack = min(STAMP_SLACK_US, median_low(b - a for a, b in pairwise(stamps)) // 2)
    end_us = None if end is None else stamps[0] + round(Fraction(str(end)) * 1_000_000)
    kept = [
        index for index in range(skip_start, len(stamps) - skip_end) if end_us is None or stamps[index] < end_us - slack
    ]
    if not kept:
        assert isinstance(windows, Skipped)
        return
    shown = displayed_frames(stamps, kept[0], kept[-1] + 1, fps, end_us)
    expected = [tuple(shown[start : start + 3]) for start in range(0, len(shown) - 2, 3)]
    if not expected:
        assert isinstance(windows, Skipped)
        assert windows.reason.startswith(f"too short: {len(shown)} frame")
        return
    assert isinstance(windows, list)
    assert [window.indices for window in windows] == list(dict.fromkeys(expected))


@settings(max_examples=100)
@given(
    variable_rate(),
    st.sampled_from([0, 1, 8, 24, 29.97]),
    st.integers(1, 20),
    st.sampled_from(["even", "consecutive"]),
    st.booleans(),
)
def test_windows_are_in_range_ascending_distinct_and_long_enough(
    stamps: list[int], fps: float, count: int, placement: str, flip: bool
) -> None:
    data = make_data(
        fps=fps, windows_per_clip=count, window_placement=placement, random_flip=flip, frame_buckets=[1, 5, 9]
    )
    windows = cut_windows(stamps, 64, 96, data)
    assert isinstance(windows, list)
    assert 1 <= len(windows) <= count * (1 + flip)
    assert len({(window.indices, window.flip) for window in windows}) == len(windows)
    assert [window.flip for window in windows] == [False, True] * (len(windows) // 2) if flip else True
    for window in windows:
        assert len(window.indices) == window.bucket.frames
        assert list(window.indices) == sorted(window.indices)
        assert all(0 <= index < len(stamps) for index in window.indices)
        assert window.timestamps_us == tuple(stamps[index] for index in window.indices)
    if placement == "consecutive" and not fps:
        indices = [index for window in windows[:: 1 + flip] for index in window.indices]
        assert indices == list(range(len(indices)))


@given(st.integers(1, 60), st.integers(0, 500), st.integers(1, 40), st.booleans())
def test_window_starts_fit_and_keep_apart_when_there_is_room(
    frames: int, more: int, windows: int, consecutive: bool
) -> None:
    num_frames = frames + more
    starts = window_starts(num_frames, frames, windows, consecutive)
    gaps = [b - a for a, b in pairwise(starts)]
    assert starts[0] == 0
    assert starts[-1] + frames <= num_frames
    assert 1 <= len(starts) <= windows
    if consecutive:
        assert all(gap == frames for gap in gaps)
        assert len(starts) == min(windows, num_frames // frames)
        return
    assert all(2 * gap >= frames for gap in gaps)
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert len(starts) == 1 or starts[-1] + frames == num_frames
    if windows * frames <= num_frames:
        assert len(starts) == windows
        assert all(gap >= frames for gap in gaps)


def test_skipped_frames_come_off_both_ends_before_anything_else() -> None:
    [window] = cut(steady(20, 8), skip_frames_start=4, skip_frames_end=5, frame_buckets=[9, 11, 12])
    assert window.indices == tuple(range(4, 15))


def test_start_and_end_seconds_count_from_the_first_frame() -> None:
    stamps = steady(40, 10, start_us=700_000)
    [window] = cut(stamps, start=1, end=2, frame_buckets=[9, 10, 11])
    assert window.indices == tuple(range(10, 20))
    [window] = cut(stamps, start=1, skip_frames_start=3, frame_buckets=[9])
    assert window.indices[0] == 10
    [window] = cut(stamps, end=2, skip_frames_start=3, frame_buckets=[9, 17])
    assert window.indices == tuple(range(3, 20))


@pytest.mark.parametrize("unit_us", [1, 1000])
@pytest.mark.parametrize("frame", [1, 7, 16, 28])
def test_a_start_given_as_frame_over_fps_begins_with_that_frame(frame: int, unit_us: int) -> None:
    stamps = steady(60, 24, unit_us=unit_us)
    assert cut(stamps, start=frame / 24, frame_buckets=[9])[0].indices[0] == frame
    assert cut(stamps, end=(frame + 9) / 24, frame_buckets=[frame + 9])[0].indices[-1] == frame + 8
    beyond = reason(stamps, end=(frame + 9) / 24, frame_buckets=[frame + 10])
    assert beyond == f"too short: {frame + 9} frames, the smallest bucket is {frame + 10}"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"stamps": []}, "no frames"),
        ({"stamps": steady(9, 8), "source_height": 0}, "no pixels: 0x96"),
        ({"stamps": [0]}, "too short: 1 frame, the smallest bucket is 9"),
        ({"stamps": steady(10, 16), "fps": 8}, "too short: 5 frames at 8 fps, the smallest bucket is 9"),
        (
            {"stamps": steady(9, 8), "skip_frames_start": 5, "skip_frames_end": 4},
            "no frames left: 9 in the video, skip_frames_start = 5, skip_frames_end = 4",
        ),
        (
            {"stamps": steady(16, 8), "start": 3.5},
            "no frames in its time: 3.5 s to the end, in a video of 0.00 s to 2.00 s",
        ),
        (
            {"stamps": steady(16, 8), "start": 3, "end": 5},
            "no frames in its time: 3 s to 5 s, in a video of 0.00 s to 2.00 s",
        ),
    ],
)
def test_a_video_that_gives_no_clip_says_why(arguments: dict[str, Any], expected: object) -> None:
    assert reason(**arguments) == expected


def test_a_source_is_enlarged_to_twice_its_size_at_most() -> None:
    cut(steady(9, 8), 32, 48)
    for size in ((32, 47), (31, 48), (20, 96)):
        assert reason(steady(9, 8), *size) == f"too few pixels: {size[0]}x{size[1]} for 64x96"
    cut(steady(9, 8), 20, 96, video_reshape_mode="letterbox")  # one side fills the bucket
    assert reason(steady(9, 8), 20, 40, video_reshape_mode="letterbox").startswith("too few pixels")


@pytest.mark.parametrize(
    ("size", "buckets", "chosen"),
    [
        ((640, 960), [[64, 96], [96, 64], [80, 80]], (64, 96)),
        ((1920, 1080), [[64, 96], [96, 64], [80, 80]], (96, 64)),
        ((500, 512), [[64, 96], [96, 64], [80, 80]], (80, 80)),
        ((320, 320), [[80, 160], [304, 160]], (304, 160)),  # the larger one of two equally near ratios
        ((640, 960), [[64, 96], [128, 192]], (128, 192)),
        ((640, 960), [[128, 192], [64, 96]], (128, 192)),
        ((200, 300), [[480, 720], [240, 352]], (240, 352)),  # the other would enlarge it too much
        ((240, 360), [[480, 720], [240, 352]], (480, 720)),
    ],
)
def test_the_resolution_bucket_is_the_nearest_in_reach(
    size: tuple[int, int], buckets: list[list[int]], chosen: tuple[int, int]
) -> None:
    assert cut(steady(9, 8), *size, resolution_buckets=buckets)[0].bucket == Bucket(9, *chosen)


def test_windows_inside_one_held_frame_are_stored_once() -> None:
    stamps = [*steady(9, 8), 60_000_000]
    windows = cut(stamps, fps=8, windows_per_clip=40, window_placement="consecutive", frame_buckets=[9])
    assert [window.indices for window in windows] == [tuple(range(9)), (8,) * 9]


def test_the_last_picture_is_shown_for_its_own_duration() -> None:
    data = make_data(fps=8, frame_buckets=[9, 17])
    assert isinstance(cut_windows([0, 500_000], 64, 96, data), Skipped)
    [window] = cut_windows([0, 500_000], 64, 96, data, end_us=2_200_000)  # type: ignore[misc]
    assert window.indices == (0,) * 4 + (1,) * 13
    [window] = cut_windows([0, 500_000], 64, 96, data, end_us=2_200_000, end_seconds=1.25)  # type: ignore[misc]
    assert window.indices == (0,) * 4 + (1,) * 5


def test_times_of_a_row_count_from_the_containers_start() -> None:
    data = make_data(frame_buckets=[9])
    stamps = steady(150, 25)
    for start_us, first in ((0, 75), (2_023_000, 25), (5_000_000, 0)):
        [window] = cut_windows(stamps, 64, 96, data, start_us=start_us, start_seconds=3)  # type: ignore[misc]
        assert window.indices[0] == first
    before = cut_windows(stamps, 64, 96, data, start_us=5_000_000, start_seconds=1, end_seconds=4)
    assert before == Skipped("no frames in its time: 1 s to 4 s, in a video of 5.00 s to 11.00 s")


def test_rows_of_a_film_of_two_hours_at_60_fps_are_cut_quickly() -> None:
    stamps = array("q", (number * 1_000_000 // 60 for number in range(432_000)))
    begin = time.process_time()
    for start in range(10):
        [window] = cut_windows(stamps, 64, 96, make_data(fps=8), start_seconds=7_000 + start)  # type: ignore[misc]
        assert window.indices[0] == (7_000 + start) * 60
    assert time.process_time() - begin < 2


def test_equal_time_stamps_are_legal() -> None:
    assert cut([0, 0, 0, 0], fps=8, frame_buckets=[1])[0].indices == (3,)
    assert cut([0, 0, 0, 0], frame_buckets=[4])[0].indices == (0, 1, 2, 3)

"""Time stamps and settings -> windows of frames, each with its bucket. Pure; nothing is decoded here."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from precompute.clip import Skipped
from precompute.video.timeline import lay_out
from shared.config import Data
from shared.model.geometry import ENCODE_CHUNK_FRAMES, Bucket, choose_frames, choose_resolution, first_chunk_frames

MAX_UPSCALE = 2
"""A source that needs a larger enlargement, in either direction, is skipped."""


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
    start_seconds: float | None = None,
    end_seconds: float | None = None,
) -> list[Window] | Skipped:
    """Return the windows of a video with these time stamps and this displayed size (rotation applied).

    The bucket has the most frames that fit into the `timeline` and `max_num_frames`, and the height and width nearest
    in aspect ratio among those within `MAX_UPSCALE`. One window begins at the start.
    """
    if height <= 0 or width <= 0:
        return Skipped(f"no pixels: {height}x{width}")
    timeline = lay_out(timestamps_us, data, start_seconds, end_seconds)
    if isinstance(timeline, str):
        return Skipped(timeline)
    frames = choose_frames(min(timeline.num_frames, data.max_num_frames), data.frame_buckets)
    if frames is None:
        found = f"{timeline.num_frames} frame{'' if timeline.num_frames == 1 else 's'}"
        rate = f" at {data.fps:g} fps" if data.fps else ""
        return Skipped(f"too short: {found}{rate}, the smallest bucket is {min(data.frame_buckets)}")
    resolution = _resolution(height, width, data)
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


def bucket_warnings(data: Data) -> list[str]:
    """Return a line for each frame bucket in use whose first VAE chunk is larger than that of 8k+1 frames."""
    usual = first_chunk_frames(ENCODE_CHUNK_FRAMES + 1)
    return [
        f"frame bucket {frames}: the VAE's first chunk has {first_chunk_frames(frames)} frames instead of {usual}, "
        f"which costs memory; {frames - frames % ENCODE_CHUNK_FRAMES + 1} would not"
        for frames in sorted(set(data.frame_buckets))
        if frames <= data.max_num_frames and first_chunk_frames(frames) > usual
    ]


def _resolution(height: int, width: int, data: Data) -> tuple[int, int] | Skipped:
    """Return height and width of the nearest bucket within `MAX_UPSCALE`."""
    letterbox = data.video_reshape_mode == "letterbox"
    upscale = {size: _upscale((height, width), size, letterbox) for size in data.resolutions}
    within_reach = [size for size in upscale if upscale[size] <= MAX_UPSCALE]
    if within_reach:
        return choose_resolution(height, width, within_reach)
    nearest = min(upscale, key=lambda size: upscale[size])
    return Skipped(f"too few pixels: {height}x{width} for {nearest[0]}x{nearest[1]}")


def _upscale(source: tuple[int, int], bucket: tuple[int, int], letterbox: bool) -> Fraction:
    """Return the enlargement that makes the source (height, width) cover the bucket, or fit into it for letterbox."""
    scales = [Fraction(wanted, there) for wanted, there in zip(bucket, source, strict=True)]
    return min(scales) if letterbox else max(scales)

"""Pictures of a clip for a captioning model, sampled by time stamps."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prepare.probe import bounds, open_video
from shared.errors import DataError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from PIL.Image import Image

MAX_SIDE = 768
"""Pixels of the longer side; more costs tokens and adds little to a caption."""
SEEK_SECONDS = 10.0
"""A gap between two wanted pictures that is skipped by seeking instead of decoded."""


def sample_frames(path: Path, count: int, start: float | None, end: float | None) -> list["Image"]:
    """Return `count` pictures, each displayed in the middle of one of `count` equal parts of the clip.

    Times are seconds from the container's origin. Raises `DataError` if no picture can be decoded.
    """
    with open_video(path) as (container, stream):
        begins, ends = bounds(container, stream)
        first = min(begins if start is None else start, ends)
        last = max(first, ends if end is None else min(end, ends))
        times = [first + (last - first) * (part + 0.5) / count for part in range(count)]
        aspect = float(stream.sample_aspect_ratio or 1)
        pictures = [_as_displayed(frame, aspect) for frame in _frames_at(container, stream, times)]
    if not pictures:
        raise DataError("damaged: no picture can be decoded")
    return pictures


def _frames_at(container: "InputContainer", stream: "VideoStream", times: list[float]) -> Iterator["VideoFrame"]:
    """Yield the frame displayed at each of the ascending `times`; the first or last one outside the video."""
    origin = (container.start_time or 0) / 1e6
    frames = container.decode(stream)
    shown = upcoming = next(frames, None)
    for time in times:
        if upcoming is not None and time + origin - (upcoming.time or 0.0) > SEEK_SECONDS:
            container.seek(int((time + origin) * 1e6))
            frames = container.decode(stream)
            shown = upcoming = next(frames, None) or shown
        while upcoming is not None and (upcoming.time or 0.0) <= time + origin:
            shown, upcoming = upcoming, next(frames, None)
        if shown is not None:
            yield shown


def _as_displayed(frame: "VideoFrame", aspect: float) -> "Image":
    """Return the frame turned, its pixels `aspect` times as wide as high, at most `MAX_SIDE` pixels long."""
    picture: Image = frame.to_image()  # type: ignore[no-untyped-call]
    picture = picture.resize((max(1, round(picture.width * aspect)), picture.height)) if aspect != 1 else picture
    picture = picture.rotate(frame.rotation, expand=True) if frame.rotation else picture
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    return picture

"""A light look at a video: length, rate and displayed size, from metadata and the first picture.

Stage 1 probes exactly, in killable processes; nothing here is stored.
"""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

VIDEO_SUFFIXES = {".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts"}
VIDEO_SUFFIXES |= {".ogv", ".ts", ".vob", ".webm", ".wmv"}
"""Files in a folder that are taken for videos."""
IMAGE_SUFFIXES = {".bmp", ".heic", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True, slots=True)
class VideoSummary:
    """Estimates from a video's metadata."""

    seconds: float
    fps: float
    height: int
    """As displayed: square pixels, rotation applied."""
    width: int

    def frames_at(self, fps: float) -> int:
        """Return the number of frames at `fps` frames per second."""
        return max(1, -int(-(self.seconds * fps - 0.05) // 1))


def probe(path: Path) -> VideoSummary | str:
    """Return what the file says of itself, or why it is no usable video, in one line."""
    import av

    try:
        with path.open("rb") as file, av.open(file, "r", io_open=_refuse, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if not isinstance(stream, av.VideoStream) or stream.disposition & av.stream.Disposition.attached_pic:
                return "not a video: no moving pictures in it"
            frame = next(container.decode(stream), None)
            if frame is None:
                return "damaged: no picture can be decoded"
            seconds = _seconds(stream.duration, stream.time_base) or _seconds(container.duration, Fraction(1, 10**6))
            aspect = float(stream.sample_aspect_ratio or 1)
            height, width = frame.height, round(frame.width * aspect)
            height, width = (width, height) if frame.rotation % 180 else (height, width)
            rate = float(stream.average_rate or stream.guessed_rate or 0)
    except (av.FFmpegError, OSError, ValueError) as error:
        return f"not a video that can be read: {getattr(error, 'strerror', None) or error}"
    if seconds is None:
        return "length unknown; convert it with ffmpeg to an mp4"
    return VideoSummary(seconds, rate, height, width)


def _seconds(duration: int | None, time_base: Fraction | None) -> float | None:
    return float(duration * time_base) if duration and time_base else None


def _refuse(url: str, flags: int, options: dict[str, Any]) -> NoReturn:
    raise ValueError("it refers to another file")

"""A light look at a video: length, rate and displayed size, from metadata and the first picture.

Stage 1 probes exactly, in killable processes; nothing here is stored.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shared.errors import DataError
from shared.file_types import VIDEO_FORMATS

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream


@dataclass(frozen=True, slots=True)
class VideoSummary:
    """Estimates from a video's metadata."""

    seconds: float
    height: int
    """As displayed: square pixels, rotation applied."""
    width: int
    starts_at: float = 0.0
    """Seconds from the container's origin of time to the first picture."""

    def frames_at(self, fps: float) -> int:
        """Return the number of frames at `fps` frames per second."""
        return max(1, -int(-(self.seconds * fps - 0.05) // 1))


def probe(path: Path) -> VideoSummary:
    """Return what the file says of itself. Raises `DataError` if it is no usable video."""
    with open_video(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise DataError("damaged: no picture can be decoded")
        begins, ends = bounds(container, stream)
        height, width = frame.height, round(frame.width * float(stream.sample_aspect_ratio or 1))
        turned = frame.rotation % 180 == 90
    if ends <= begins:
        raise DataError("length unknown: convert it with ffmpeg to an mp4")
    return VideoSummary(ends - begins, width if turned else height, height if turned else width, begins)


def bounds(container: "InputContainer", stream: "VideoStream") -> tuple[float, float]:
    """Return the seconds from the container's origin of time to the first picture and to the end of the last one."""
    base = float(stream.time_base or 0)
    begins = max(0.0, (stream.start_time or 0) * base - (container.start_time or 0) / 1e6)
    return begins, begins + stream.duration * base if stream.duration else (container.duration or 0) / 1e6


@contextmanager
def open_video(path: Path) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """Open a video by its content; what PyAV raises in the block becomes a `DataError`."""
    import av

    options = {"format_whitelist": VIDEO_FORMATS, "protocol_whitelist": "file"}
    try:
        with path.open("rb") as file, av.open(file, "r", options=options, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if not isinstance(stream, av.VideoStream) or stream.disposition & av.stream.Disposition.attached_pic:
                raise DataError("not a video: no moving pictures in it")
            yield container, stream
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DataError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None

"""A video file -> its hash, its shape and the time of every frame; or a `VideoError` with one line.

`decode` opens and demuxes files through this module too. Files are untrusted: read them in a `pool`.
"""

import errno
import hashlib
import os
import stat
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

MAX_SIDE = 8192
MAX_FRAMES = 100_000
FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpegts", "mpeg", "flv", "asf", "gif")
IMAGE_FORMATS = ("png_pipe", "jpeg_pipe", "webp_pipe")
INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
"""Containers with a presentation time on every packet, and one displayed frame per packet of a `ONE_TO_ONE` codec."""
ONE_TO_ONE = ("h264", "hevc", "vp9", "av1")
BAD_NAMES = (errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)
"""Permanent failures of `open`: links in a circle, a name too long, a socket."""
MIRRORED = (2, 4, 5, 7)
"""EXIF orientations (CIPA DC-008, 4.6.6) that mirror an image."""
NOT_A_ROTATION = "its display matrix is not a rotation by quarter turns"

FileMark = tuple[int, int, int, int, int]
"""Device, inode, size in bytes, mtime and ctime in nanoseconds."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """The reason why a source or clip is left out."""

    reason: str
    """One short line; reports count reasons up to the first colon."""
    permanent: bool = True
    """True for a bad file, False for a failure that a later run may not have."""


class VideoError(Exception):
    """A file without exact frames; `reason` is one short line, and reports count reasons up to the first colon.

    Permanent: the file is bad for every reader. Otherwise transient: it vanished, changed or could not be read.
    """

    def __init__(self, reason: str, *, permanent: bool = True) -> None:
        self.reason, self.permanent = " ".join(reason.split())[:200], permanent
        super().__init__(self.reason)


@dataclass(frozen=True, slots=True)
class Probe:
    """The content of a video file, found by demuxing, or by decoding where packets do not give the displayed frames."""

    sha256: str
    """Of the file's bytes, read through the probed descriptor."""
    mark: FileMark
    """Of that descriptor; an equal mark means equal bytes."""
    num_frames: int
    """Displayed frames."""
    origin: int
    """Presentation time of the first displayed frame, in the stream's time base."""
    height: int
    width: int
    """As displayed, after `rotation`; pixels count as square."""
    rotation: int
    """0, 90, 180 or 270 degrees counter-clockwise from stored to displayed (FFmpeg's display matrix)."""
    codec: str
    container: str
    """FFmpeg's names, such as `h264` and `mov,mp4,m4a,3gp,3g2,mj2`."""
    pixel_format: str = ""
    """FFmpeg's name, followed by ` interlaced` where the first frame is."""
    intact: bool = False
    """True if probing decoded every frame and found none damaged, False if it only counted packets."""
    one_to_one: bool = False
    """True if every displayed frame has one packet and a time of its own."""


def parse_probe(fields: Mapping[str, Any]) -> Probe:
    """Return the probe whose `asdict` went through JSON."""
    return Probe(**{**fields, "mark": tuple(fields["mark"])})


@dataclass(frozen=True, slots=True)
class Probed:
    """A probe with the time stamps that window cutting needs once, 8 bytes per frame."""

    probe: Probe
    timestamps_us: "array[int]"
    """Presentation times of the displayed frames in microseconds, ascending from 0."""


def probe(path: Path) -> Probed:
    """Hash the file at `path`, count its frames and read their times; raise `VideoError`."""
    with opened(path) as file, reading():
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        with demuxer(file) as (container, stream):
            name, codec, base = container.format.name, stream.codec.canonical_name, stream.time_base
            by_packets = name in INDEXED and codec in ONE_TO_ONE
            times, first = _times_of_packets(container, stream) if by_packets else (None, None)
        if name in IMAGE_FORMATS:
            _refuse_mirrored(file)
        if by_frames := times is None:
            with demuxer(file) as (container, stream):
                times, first = _times_of_frames(container, stream)
        if first is None or not times or base is None:
            raise VideoError("no frame can be decoded")
        turned = rotation(first)
        found = Probe(
            sha256=digest,
            mark=mark(file),
            num_frames=len(times),
            origin=times[0],
            height=first.width if turned % 180 else first.height,
            width=first.height if turned % 180 else first.width,
            rotation=turned,
            codec=codec,
            container=name,
            pixel_format=first.format.name + (" interlaced" if first.interlaced_frame else ""),
            intact=by_frames,
            one_to_one=not by_frames and all(a < b for a, b in pairwise(times)),
        )
        return Probed(found, array("q", (microseconds(time - times[0], base) for time in times)))


@contextmanager
def opened(path: Path) -> Iterator[FileIO]:
    """Open the regular file at `path` once; all reading goes through this descriptor.

    Raise `VideoError`; a file that changed while it was read is a transient failure.
    """
    try:
        # Without O_NONBLOCK a FIFO would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except ValueError as error:
        raise VideoError(f"cannot open: {error}") from error
    except OSError as error:
        raise VideoError(f"cannot open: {error.strerror}", permanent=error.errno in BAD_NAMES) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise VideoError("not a regular file")
        file = FileIO(descriptor, closefd=False)
        before = mark(file)
        try:
            yield file
        finally:
            if mark(file) != before:
                raise VideoError("it changed while it was read", permanent=False)
    finally:
        os.close(descriptor)


def mark(file: FileIO) -> FileMark:
    """Return the present mark of an open file."""
    return mark_of(os.fstat(file.fileno()))


def mark_of(status: os.stat_result) -> FileMark:
    """Return the mark that a file with this status has."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@contextmanager
def reading() -> Iterator[None]:
    """Convert what readers raise into `VideoError`: permanent for damaged files, transient for the file system.

    Mutated files raised ten exception types, AttributeError among them. Exceptions about our own code pass through.
    """
    import av

    try:
        yield
    except (VideoError, MemoryError, ImportError, AssertionError):
        raise
    except av.FFmpegError as error:  # some are an OSError too, but come from FFmpeg and not from the file system
        raise VideoError(f"damaged: {error.strerror}") from error
    except OSError as error:
        raise VideoError(f"cannot be read: {error.strerror or error}", permanent=False) from error
    except Exception as error:
        raise VideoError(f"cannot be read: {type(error).__name__}: {error}") from error


@contextmanager
def demuxer(file: FileIO) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """Open PyAV on `file` from its start, with the listed formats only; no second file is ever opened."""
    import av

    file.seek(0)
    options = {"format_whitelist": ",".join((*FORMATS, *IMAGE_FORMATS)), "protocol_whitelist": "file"}
    try:
        source = av.open(file, "r", options=options, io_open=_refuse, metadata_errors="replace", buffer_size=2**18)
    except av.FFmpegError as error:
        raise VideoError(f"not a video: {error.strerror}") from error
    with source:
        stream = source.streams.best("video")
        if not isinstance(stream, av.VideoStream) or stream.disposition & av.stream.Disposition.attached_pic:
            raise VideoError("not a video: no moving pictures in it")
        if stream.codec_context is None:
            raise VideoError("no decoder for its codec")
        _check_size(stream.width, stream.height)
        # The pool gives the parallelism; further threads would only take memory from the limit.
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        yield source, stream


def _refuse_mirrored(file: FileIO) -> None:
    """Raise `VideoError` for an image whose EXIF orientation mirrors it."""
    from PIL import ExifTags, Image

    file.seek(0)
    orientation = None
    with suppress(OSError, ValueError, SyntaxError), Image.open(file) as image:  # FFmpeg may read it nevertheless
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    if orientation in MIRRORED:
        raise VideoError(NOT_A_ROTATION)


def _refuse(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    raise VideoError("not a video: it refers to another file")


def _check_size(width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE:
        raise VideoError(f"too large: {width}x{height} pixels, more than {MAX_SIDE} a side")


def _times_of_packets(
    container: "InputContainer", stream: "VideoStream"
) -> tuple[list[int] | None, "VideoFrame | None"]:
    """Return the times of the displayed packets in the stream's time base and the first frame, or (None, None).

    Packets do not give the displayed frames where one has no time, or precedes the first keyframe: decoders drop those.
    """
    times: list[int] = []
    first: VideoFrame | None = None
    begin: int | None = None
    for packet in container.demux(stream):
        first = first or next(iter(packet.decode()), None)
        if packet.size == 0:
            continue
        if packet.pts is None or (begin is None and not packet.is_keyframe):
            return None, None
        begin = packet.pts if begin is None else begin
        if packet.pts < begin:
            return None, None
        if not packet.is_discard:
            times.append(packet.pts)
        _check_count(len(times))
    return sorted(times), first


def _times_of_frames(container: "InputContainer", stream: "VideoStream") -> tuple[list[int], "VideoFrame | None"]:
    """Return the times of the decoded frames in the stream's time base, and the first frame."""
    times: list[int] = []
    first: VideoFrame | None = None
    for frame in displayed(container, stream):
        first = first or frame
        if frame.pts is None:
            raise VideoError(f"no time stamp: of frame {len(times)}")
        times.append(frame.pts)
        _check_count(len(times))
    if container.format.name == "avi":
        times.sort()  # it numbers packets in decoding order: right times in the wrong order
    elif any(a > b for a, b in pairwise(times)):
        raise VideoError("time stamps go backwards")
    return times, first


def displayed(container: "InputContainer", stream: "VideoStream") -> Iterator["VideoFrame"]:
    """Yield the decoded frames in display order; raise `VideoError` at one that conceals an error."""
    for number, frame in enumerate(container.decode(stream)):
        check_frame(frame, number)
        yield frame


def check_frame(frame: "VideoFrame", number: int) -> None:
    """Raise `VideoError` for a damaged or too large picture."""
    if frame.is_corrupt:
        raise VideoError(f"damaged: at frame {number}")
    _check_size(frame.width, frame.height)


def _check_count(count: int) -> None:
    if count > MAX_FRAMES:
        raise VideoError(f"more than {MAX_FRAMES} frames")


def microseconds(ticks: int, time_base: Fraction) -> int:
    """Return a duration in microseconds, rounded to the nearest."""
    scale, unit = 2_000_000 * time_base.numerator, time_base.denominator
    return (ticks * scale + unit) // (2 * unit)


def rotation(frame: "VideoFrame") -> int:
    """Return degrees counter-clockwise, 0 to 270; raise `VideoError` for a mirrored or slanted display matrix."""
    try:
        entries: Any = frame.side_data
    except ValueError:  # a kind that PyAV does not know, such as EXIF, which `_refuse_mirrored` reads
        entries = ()
    matrix = next((entry for entry in entries if entry.type.name == "DISPLAYMATRIX"), None)
    if matrix is not None:
        a, b, _, c, d = np.frombuffer(bytes(matrix), "<i4").astype(object)[:5]
        if a * d - b * c <= 0 or frame.rotation % 90:
            raise VideoError(NOT_A_ROTATION)
    return frame.rotation % 360

"""A video file -> what it holds: its hash, its shape and the time of every frame; or one line that says why not.

Here is also the one way in which a file is opened and demuxed, by PyAV, for `decode` too. Files are untrusted: read
them in a `pool`.
"""

import errno
import hashlib
import os
import stat
from array import array
from collections.abc import Iterator
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
"""Containers that give every packet its presentation time and hold one displayed frame per packet of `ONE_TO_ONE`."""
ONE_TO_ONE = ("h264", "hevc", "vp9", "av1")
BAD_NAMES = (errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)
"""What opening says of a file that nobody will ever read: links in a circle, a name too long, a socket."""
MIRRORED = (2, 4, 5, 7)
"""EXIF orientations (CIPA DC-008, 4.6.6) that turn an image over."""
NO_TURN = "its display matrix is no quarter turn"

FileMark = tuple[int, int, int, int, int]
"""Device, inode, size in bytes, and the times of the last change of bytes and of anything, in nanoseconds."""


class _OneLine(Exception):
    """`reason` is one short line."""

    def __init__(self, reason: str) -> None:
        super().__init__(" ".join(reason.split())[:200])

    @property
    def reason(self) -> str:
        return str(self.args[0])


class BadVideo(_OneLine):
    """A file that gives no exact frames: so it is for every reader, until the file is another.

    Reports count reasons up to the first colon, so what differs from file to file comes after it.
    """


class MachineFault(_OneLine):
    """A file that was not to be had this time: it vanished, changed while it was read, or reading failed."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a video file holds, found by demuxing, or by decoding where packets do not tell the displayed frames."""

    sha256: str
    """Of the file's bytes, read through the descriptor that was probed."""
    mark: FileMark
    """Of that descriptor; the same mark means the same bytes."""
    num_frames: int
    """As displayed."""
    origin: int
    """Presentation time of the first displayed frame, in the stream's time base."""
    height: int
    width: int
    """As displayed, after `rotation`; pixels are taken as square."""
    rotation: int
    """0, 90, 180 or 270 degrees counter-clockwise from stored to displayed (FFmpeg's display matrix)."""
    codec: str
    container: str
    """FFmpeg's names, such as `h264` and `mov,mp4,m4a,3gp,3g2,mj2`."""
    pixel_format: str = ""
    """FFmpeg's name, followed by ` interlaced` where the first frame is."""
    intact: bool = False
    """Whether probing decoded every frame and found none damaged; else only packets were counted."""
    one_to_one: bool = False
    """Whether every displayed frame has one packet and a time of its own."""


@dataclass(frozen=True, slots=True)
class Probed:
    """A probe and what is needed once, to cut windows: 8 bytes a frame."""

    probe: Probe
    timestamps_us: "array[int]"
    """Presentation time of every displayed frame, ascending, the first 0, in whole microseconds."""


def probe(path: Path) -> Probed:
    """Hash, count and time the frames of the file at `path`; raises `BadVideo` or `MachineFault`."""
    with opened(path) as file, reading():
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        with demuxer(file) as (container, stream):
            name, codec, base = container.format.name, stream.codec.canonical_name, stream.time_base
            by_packets = name in INDEXED and codec in ONE_TO_ONE
            times, first = _times_of_packets(container, stream) if by_packets else (None, None)
        if name in IMAGE_FORMATS:
            _refuse_mirrored(file)
        by_frames = times is None
        if times is None:
            with demuxer(file) as (container, stream):
                times, first = _times_of_frames(container, stream)
        if first is None or not times or base is None:
            raise BadVideo("no frame can be decoded")
        turned = rotation(first)
        height, width = (first.width, first.height) if turned % 180 else (first.height, first.width)
        found = Probe(
            sha256=digest,
            mark=mark(file),
            num_frames=len(times),
            origin=times[0],
            height=height,
            width=width,
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
    """The regular file at `path`, opened once; everything after reads this descriptor.

    Whatever was read of a file that changed meanwhile counts for nothing: that is a `MachineFault`.
    """
    try:
        # Without O_NONBLOCK a FIFO would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except ValueError as error:
        raise BadVideo(f"cannot open: {error}") from error
    except OSError as error:
        kind = BadVideo if error.errno in BAD_NAMES else MachineFault
        raise kind(f"cannot open: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BadVideo("not a regular file")
        file = FileIO(descriptor, closefd=False)
        before = mark(file)
        try:
            yield file
        finally:
            if mark(file) != before:
                raise MachineFault("it changed while it was read")
    finally:
        os.close(descriptor)


def mark(file: FileIO) -> FileMark:
    """Of an open file, as it is now."""
    return mark_of(os.fstat(file.fileno()))


def mark_of(status: os.stat_result) -> FileMark:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@contextmanager
def reading() -> Iterator[None]:
    """Turns what readers raise on damaged files into `BadVideo`, and what the file system raises into `MachineFault`.

    Any type may come (mutated files raised ten of them, AttributeError too); those that tell of ourselves stay.
    """
    import av

    try:
        yield
    except (_OneLine, MemoryError, ImportError, AssertionError):
        raise
    except av.FFmpegError as error:  # some are an OSError, too: FFmpeg's verdict, not the file system's
        raise BadVideo(f"damaged: {error.strerror}") from error
    except OSError as error:
        raise MachineFault(f"cannot be read: {error.strerror or error}") from error
    except Exception as error:
        raise BadVideo(f"cannot be read: {type(error).__name__}: {error}") from error


@contextmanager
def demuxer(file: FileIO) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """PyAV on `file` from its start; no format outside the lists is tried and no second file is ever opened."""
    import av

    file.seek(0)
    options = {"format_whitelist": ",".join((*FORMATS, *IMAGE_FORMATS)), "protocol_whitelist": "file"}
    try:
        source = av.open(file, "r", options=options, io_open=_refuse, metadata_errors="replace", buffer_size=2**18)
    except av.FFmpegError as error:
        raise BadVideo(f"not a video: {error.strerror}") from error
    with source:
        stream = source.streams.best("video")
        if not isinstance(stream, av.VideoStream) or stream.disposition & av.stream.Disposition.attached_pic:
            raise BadVideo("not a video: no moving pictures in it")
        if stream.codec_context is None:
            raise BadVideo("no decoder for its codec")
        _check_size(stream.width, stream.height)
        # The pool's children are the parallelism; further threads would only take memory from the limit.
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        yield source, stream


def _refuse_mirrored(file: FileIO) -> None:
    """Raises `BadVideo` for an image whose EXIF orientation is more than a quarter turn."""
    from PIL import ExifTags, Image

    file.seek(0)
    orientation = None
    with suppress(OSError, ValueError, SyntaxError), Image.open(file) as image:  # FFmpeg may know it all the same
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    if orientation in MIRRORED:
        raise BadVideo(NO_TURN)


def _refuse(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    raise BadVideo("not a video: it refers to another file")


def _check_size(width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE:
        raise BadVideo(f"too large: {width}x{height} pixels, more than {MAX_SIDE} a side")


def _times_of_packets(
    container: "InputContainer", stream: "VideoStream"
) -> tuple[list[int] | None, "VideoFrame | None"]:
    """Times of the displayed packets in the stream's time base, and the first frame; None where packets may not tell.

    Pictures that precede the first keyframe in time need pictures that are not there, and decoders drop them.
    """
    times: list[int] = []
    first: VideoFrame | None = None
    begin: int | None = None
    for packet in container.demux(stream):
        if first is None:
            first = next(iter(packet.decode()), None)
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
    """Times of the decoded frames in the stream's time base, and the first frame."""
    times: list[int] = []
    first: VideoFrame | None = None
    for frame in displayed(container, stream):
        first = first or frame
        if frame.pts is None:
            raise BadVideo(f"no time stamp: of frame {len(times)}")
        times.append(frame.pts)
        _check_count(len(times))
    if container.format.name == "avi":
        # AVI numbers packets in decoding order: the right times in the wrong order.
        times.sort()
    elif any(a > b for a, b in pairwise(times)):
        raise BadVideo("time stamps go backwards")
    return times, first


def displayed(container: "InputContainer", stream: "VideoStream") -> Iterator["VideoFrame"]:
    """Decoded frames in display order; a concealed error is an error."""
    for number, frame in enumerate(container.decode(stream)):
        check_frame(frame, number)
        yield frame


def check_frame(frame: "VideoFrame", number: int) -> None:
    """Raises `BadVideo` for a picture that is damaged, or larger than any here may be."""
    if frame.is_corrupt:
        raise BadVideo(f"damaged: at frame {number}")
    _check_size(frame.width, frame.height)


def _check_count(count: int) -> None:
    if count > MAX_FRAMES:
        raise BadVideo(f"more than {MAX_FRAMES} frames")


def microseconds(ticks: int, time_base: Fraction) -> int:
    """A duration in microseconds, to the nearest."""
    scale, unit = 2_000_000 * time_base.numerator, time_base.denominator
    return (ticks * scale + unit) // (2 * unit)


def rotation(frame: "VideoFrame") -> int:
    """Degrees counter-clockwise, 0 to 270; raises `BadVideo` for a mirrored or slanted display matrix."""
    try:
        entries: Any = frame.side_data
    except ValueError:  # of a kind that PyAV does not know, as EXIF is; `_refuse_mirrored` reads that of an image
        entries = ()
    matrix = next((entry for entry in entries if entry.type.name == "DISPLAYMATRIX"), None)
    if matrix is not None:
        a, b, _, c, d = np.frombuffer(bytes(matrix), "<i4").astype(object)[:5]
        if a * d - b * c <= 0 or frame.rotation % 90:
            raise BadVideo(NO_TURN)
    return frame.rotation % 360

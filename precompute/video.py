"""A video file -> exact uint8 frames, or one line that says why not.

PyAV is the reference: it counts and times the displayed frames and decodes in sequence. decord decodes only where its
contiguous reading gives the same bytes (the table in tests/precompute/test_video.py) and PyAV has found no damage,
since decord hands out concealed frames without a word; its sampled `get_batch` returns wrong frames on open GOPs,
silently, and is never called. Files are untrusted: decode them in a `pool`.
"""

import errno
import hashlib
import importlib
import importlib.util
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

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
DECORD_CODECS = ("h264", "hevc", "mpeg4")
DECORD_CONTAINERS = (*INDEXED, "avi")
DECORD_PIXELS = ("yuv420p", "yuvj420p", "yuv422p", "yuv444p")
"""decord rounds other formats' colours differently (up to 71 of 255 on 10-bit, 27 on interlaced chroma)."""

BAD_NAMES = (errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)
"""What opening says of a file that nobody will ever read: links in a circle, a name too long, a socket."""

Decoder = Literal["pyav", "decord"]
Requested = Literal["auto", "pyav", "decord"]

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
    """A file that gives no exact frames: so it is for every reader, until the file is another."""


class MachineFault(_OneLine):
    """A file that was not to be had this time: it vanished, changed while it was read, or reading failed."""


class _Unproven(Exception):
    """decord does not agree with the probe; PyAV decides."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a video file holds, found by demuxing, or by decoding where packets do not tell the displayed frames."""

    sha256: str
    """Of the file's bytes, read through the descriptor that was probed."""
    mark: FileMark
    """Of that descriptor; the same mark means the same bytes."""
    timestamps_us: tuple[int, ...]
    """Presentation time of every displayed frame, ascending, the first 0, in whole microseconds."""
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


def probe(path: Path) -> Probe:
    """Hash, count and time the frames of the file at `path`; raises `BadVideo` or `MachineFault`."""
    with _opened(path) as file, _reading():
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        with _demuxer(file) as (container, stream):
            name, codec = container.format.name, stream.codec.canonical_name
            by_packets = name in INDEXED and codec in ONE_TO_ONE
            times, first = _times_of_packets(container, stream) if by_packets else (None, None)
        by_frames = times is None
        if times is None:
            with _demuxer(file) as (container, stream):
                times, first = _times_of_frames(container, stream)
        if first is None or not times:
            raise BadVideo("no frame can be decoded")
        rotation = _rotation(first)
        height, width = (first.width, first.height) if rotation % 180 else (first.height, first.width)
        return Probe(
            sha256=digest,
            mark=_mark(file),
            timestamps_us=times,
            height=height,
            width=width,
            rotation=rotation,
            codec=codec,
            container=name,
            pixel_format=first.format.name + (" interlaced" if first.interlaced_frame else ""),
            intact=by_frames,
        )


def choose_decoder(probe: Probe, requested: Requested) -> Decoder:
    """Who decodes; `auto` takes decord where it is exact and the file is known to be intact.

    Raises `BadVideo` where decord is demanded and not exact. (PyAV is also the faster: decord converts every frame.)
    """
    reason = _against_decord(probe)
    if requested == "decord" and reason:
        raise BadVideo(f"decord is not exact here: {reason}")
    return "decord" if requested == "decord" or (requested == "auto" and probe.intact and not reason) else "pyav"


def decode(path: Path, probe: Probe, indices: Sequence[int], decoder: Requested) -> tuple[np.ndarray, Decoder]:
    """The frames `indices` (ascending, may repeat) of `probe.timestamps_us`: uint8 [F, H, W, 3] RGB as displayed.

    Returns them with the decoder that made them; `auto` turns from decord to PyAV where decord disagrees with `probe`.
    Reads in sequence and stops after the last index. Raises `BadVideo`, also for a frame at another time than probed,
    or `MachineFault`, also for another file than probed.
    """
    assert len(indices) > 0 and all(a <= b for a, b in pairwise(indices))
    assert indices[0] >= 0 and indices[-1] < len(probe.timestamps_us)
    with _opened(path) as file, _reading():
        if _mark(file) != probe.mark and hashlib.file_digest(file, "sha256").hexdigest() != probe.sha256:
            raise MachineFault("it changed after it was probed")
        if choose_decoder(probe, decoder) == "decord":
            if not probe.intact:
                for _ in _displayed_as_probed(file, probe, last=indices[-1]):
                    pass
            try:
                return _decode_with_decord(file, path, probe, indices), "decord"
            except _Unproven as error:
                if decoder == "decord":
                    raise BadVideo(f"decord is not exact here: {error}") from error
        return _decode_with_pyav(file, probe, indices), "pyav"


def _decode_with_pyav(file: FileIO, probe: Probe, indices: Sequence[int]) -> np.ndarray:
    out = np.empty((len(indices), probe.height, probe.width, 3), np.uint8)
    row = 0
    for number, frame in _displayed_as_probed(file, probe, last=indices[-1]):
        if number == indices[row]:
            picture = _picture(frame, probe, number)
            while row < len(indices) and number == indices[row]:
                out[row] = picture
                row += 1
    assert row == len(indices)
    return out


def _displayed_as_probed(file: FileIO, probe: Probe, *, last: int) -> Iterator[tuple[int, "VideoFrame"]]:
    """(number, frame) of the frames 0 to `last`; raises `BadVideo` at one that comes at another time than probed."""
    origin: int | None = None
    decoded = 0
    with _demuxer(file) as (container, stream):
        for number, frame in enumerate(_displayed(container, stream)):
            origin = frame.pts if origin is None else origin
            expected = probe.timestamps_us[number : number + 1]
            if container.format.name != "avi" and _microseconds([frame.pts], origin, stream) != expected:
                raise BadVideo(f"frame {number} comes at another time than its packet says")
            yield number, frame
            decoded += 1
            if number == last:
                return
    raise BadVideo(f"truncated: decoded {decoded} of {len(probe.timestamps_us)} frames")


def _picture(frame: "VideoFrame", probe: Probe, number: int) -> np.ndarray:
    """uint8 [H, W, 3] RGB, turned as displayed."""
    if _rotation(frame) != probe.rotation:
        raise BadVideo(f"the rotation changes at frame {number}")
    # One thread: a converter that is not collected yet would keep its threads, and their stacks count as memory.
    stored = frame.reformat(format="rgb24", threads=1).to_ndarray()
    picture = np.rot90(stored, probe.rotation // 90)
    if picture.shape[:2] != (probe.height, probe.width):
        raise BadVideo(f"the frame size changes at frame {number}")
    return picture


def _decode_with_decord(file: FileIO, path: Path, probe: Probe, indices: Sequence[int]) -> np.ndarray:
    decord: Any = importlib.import_module("decord")
    decord.logging.set_level(decord.logging.QUIET)
    same_file = Path(f"/proc/self/fd/{file.fileno()}")
    try:
        reader = decord.VideoReader(str(same_file if same_file.exists() else path), ctx=decord.cpu(0), num_threads=1)
        times = np.asarray(probe.timestamps_us)
        if len(reader) != len(times):
            raise _Unproven(f"it counts {len(reader)} frames, PyAV {len(times)}")
        starts = reader.get_frame_timestamp(range(len(reader)))[:, 0] * 1e6
        if np.abs(starts - starts[0] - times).max() > 1000:
            raise _Unproven("it gives the frames other times than PyAV")
        out = np.empty((len(indices), probe.height, probe.width, 3), np.uint8)
        row = 0
        for number in range(indices[-1] + 1):
            frame = reader.next()
            if frame.shape != out.shape[1:]:
                raise _Unproven(f"it gives frame {number} the shape {frame.shape}")
            while row < len(indices) and number == indices[row]:
                out[row] = frame.asnumpy()
                row += 1
    except (decord.DECORDError, RuntimeError, StopIteration) as error:
        raise _Unproven(str(error).partition("\n")[0]) from error
    return out


def _against_decord(probe: Probe) -> str | None:
    """Why decord is not proven exact for this file, or None."""
    for what, value, proven in (
        ("codec", probe.codec, DECORD_CODECS),
        ("container", probe.container, DECORD_CONTAINERS),
        ("pixel format", probe.pixel_format, DECORD_PIXELS),
        ("rotation", probe.rotation, (0,)),
    ):
        if value not in proven:
            return f"{what} {value}"
    return None if importlib.util.find_spec("decord") else "decord is not installed"


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
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
        before = _mark(file)
        try:
            yield file
        finally:
            if _mark(file) != before:
                raise MachineFault("it changed while it was read")
    finally:
        os.close(descriptor)


def _mark(file: FileIO) -> FileMark:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@contextmanager
def _reading() -> Iterator[None]:
    """Turns what readers raise on damaged files into `BadVideo`, and what the file system raises into `MachineFault`.

    Any type may come (mutated files raised ten of them, AttributeError too); those that tell of ourselves stay.
    """
    import av

    try:
        yield
    except (_OneLine, MemoryError, ImportError, AssertionError):
        raise
    except av.FFmpegError as error:  # some are an OSError, too: FFmpeg's verdict, not the file system's
        raise BadVideo(f"not a video: {error.strerror}") from error
    except OSError as error:
        raise MachineFault(f"cannot be read: {error.strerror or error}") from error
    except Exception as error:
        raise BadVideo(f"cannot be read: {type(error).__name__}: {error}") from error


@contextmanager
def _demuxer(file: FileIO) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """PyAV on `file` from its start; no format outside the lists is tried and no second file is ever opened."""
    import av

    file.seek(0)
    options = {"format_whitelist": ",".join((*FORMATS, *IMAGE_FORMATS)), "protocol_whitelist": "file"}
    with av.open(file, "r", options=options, io_open=_refuse, metadata_errors="replace", buffer_size=2**18) as source:
        stream = source.streams.best("video")
        if not isinstance(stream, av.VideoStream) or stream.disposition & av.stream.Disposition.attached_pic:
            raise BadVideo("not a video: no moving pictures in it")
        if stream.codec_context is None:
            raise BadVideo("no decoder for its codec")
        _check_size(stream.width, stream.height)
        # The pool's children are the parallelism; further threads would only take memory from the limit.
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        yield source, stream


def _refuse(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    raise BadVideo("not a video: it refers to another file")


def _check_size(width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE:
        raise BadVideo(f"{width}x{height} pixels, more than {MAX_SIDE} a side")


def _times_of_packets(
    container: "InputContainer", stream: "VideoStream"
) -> tuple[tuple[int, ...] | None, "VideoFrame | None"]:
    """Times of the displayed packets in microseconds, and the first frame; None where packets may not tell.

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
    times.sort()
    return _microseconds(times, times[0] if times else 0, stream), first


def _times_of_frames(container: "InputContainer", stream: "VideoStream") -> tuple[tuple[int, ...], "VideoFrame | None"]:
    """Times of the decoded frames in microseconds, and the first frame."""
    times: list[int] = []
    first: VideoFrame | None = None
    for frame in _displayed(container, stream):
        first = first or frame
        if frame.pts is None:
            raise BadVideo(f"frame {len(times)} has no time stamp")
        times.append(frame.pts)
        _check_count(len(times))
    if container.format.name == "avi":
        # AVI numbers packets in decoding order: the right times in the wrong order.
        times.sort()
    elif any(a >= b for a, b in pairwise(times)):
        raise BadVideo("time stamps go backwards")
    return _microseconds(times, times[0] if times else 0, stream), first


def _displayed(container: "InputContainer", stream: "VideoStream") -> Iterator["VideoFrame"]:
    """Decoded frames in display order; a concealed error is an error."""
    for number, frame in enumerate(container.decode(stream)):
        if frame.is_corrupt:
            raise BadVideo(f"damaged at frame {number}")
        _check_size(frame.width, frame.height)
        yield frame


def _check_count(count: int) -> None:
    if count > MAX_FRAMES:
        raise BadVideo(f"more than {MAX_FRAMES} frames")


def _microseconds(times: Sequence[int | None], origin: int | None, stream: "VideoStream") -> tuple[int, ...]:
    """`times` since `origin` (in the stream's time base) in microseconds, to the nearest; () where one is missing."""
    base = stream.time_base
    if base is None or origin is None:
        return ()
    scale, unit = 2_000_000 * base.numerator, base.denominator
    return tuple(((time - origin) * scale + unit) // (2 * unit) for time in times if time is not None)


def _rotation(frame: "VideoFrame") -> int:
    """Degrees counter-clockwise, 0 to 270; raises `BadVideo` for a mirrored or slanted display matrix."""
    entries: Any = frame.side_data
    matrix = next((entry for entry in entries if entry.type.name == "DISPLAYMATRIX"), None)
    if matrix is not None:
        a, b, _, c, d = np.frombuffer(bytes(matrix), "<i4").astype(object)[:5]
        if a * d - b * c <= 0 or frame.rotation % 90:
            raise BadVideo("its display matrix is no quarter turn")
    return frame.rotation % 360

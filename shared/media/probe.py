"""A video file -> its hash, its shape and the time of every frame; or a `VideoError` with one line.

`decode` opens and demuxes files through this module too. Files are untrusted: read them in a `pool`.
"""

import errno
import hashlib
import os
import re
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import numpy as np

from shared.file_types import VIDEO_FORMATS
from shared.media.picture import EXIF_TURNS, Look, NotShown, look_of, turn_of
from shared.regular_files import open_regular

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

MAX_SIDE = 8192
MAX_FRAMES = 4_000_000
"""More than nine hours at 120 fps; 8 bytes each are kept."""
IMAGE_FORMATS = ("png_pipe", "jpeg_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe")
INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
"""Containers with a presentation time on every packet, and one displayed frame per packet of a `ONE_TO_ONE` codec."""
ONE_TO_ONE = ("h264", "hevc", "vp9", "av1")
BAD_NAMES = (errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)
"""Permanent failures of `open`: links in a circle, a name too long, a socket."""
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Decoders that read the alpha channel of WebM, which FFmpeg's own leave out."""

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
    look: Look
    """Of the first displayed frame."""
    codec: str
    container: str
    """FFmpeg's names, such as `h264` and `mov,mp4,m4a,3gp,3g2,mj2`."""
    start_us: int = 0
    """Time of the first displayed frame after the container's start, which players count from."""
    end_us: int = 0
    """End of the last displayed frame after the first one's time, 0 if unknown."""
    intact: bool = False
    """True if probing decoded every frame and found none damaged and all alike, False if it only counted packets."""
    one_to_one: bool = False
    """True if every displayed frame has one packet and a time of its own."""

    @property
    def height(self) -> int:
        """Displayed height in square pixels."""
        return self.look.size[0]

    @property
    def width(self) -> int:
        """Displayed width in square pixels."""
        return self.look.size[1]


def parse_probe(fields: Mapping[str, Any]) -> Probe:
    """Return the probe whose `asdict` went through JSON."""
    look: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields["look"].items()
    }
    return Probe(**{**fields, "mark": tuple(fields["mark"]), "look": Look(**look)})


@dataclass(frozen=True, slots=True)
class Probed:
    """A probe with the time stamps that window cutting needs once, 8 bytes per frame."""

    probe: Probe
    timestamps_us: "array[int]"
    """Presentation times of the displayed frames in microseconds, ascending from 0."""

    @property
    def end_us(self) -> int:
        """End of the last frame after the first one's time; where it is unknown, it lasts the mean interval."""
        times = self.timestamps_us
        return self.probe.end_us or times[-1] + times[-1] // max(1, len(times) - 1)


@dataclass(frozen=True, slots=True)
class Media:
    """An opened file and its video stream."""

    file: FileIO
    container: "InputContainer"
    stream: "VideoStream"
    decoder: "VideoCodecContext"
    crop: tuple[int, int, int, int]
    """Top, bottom, left and right that the container hides."""
    aspect: Fraction | None
    """Pixel aspect ratio by the container; None where the codec's counts."""
    turn: tuple[int, bool] | None
    """Rotation and mirroring by EXIF; None for a video."""
    animated_webp: bool
    turns: dict[int, tuple[int, bool]] = field(default_factory=dict)
    """Rotation of a display matrix -> rotation and mirroring, as far as seen."""

    @property
    def time_base(self) -> Fraction:
        """Seconds of one tick."""
        return Fraction(1, 1000) if self.animated_webp else self.stream.time_base or Fraction(1, 1_000_000)

    def look(self, frame: "VideoFrame") -> Look:
        """Return how a frame, the last decoded, is shown; raise `VideoError` where that is not possible."""
        try:
            # Side data lie in a reference cycle with their frame, so few frames are asked for them.
            turn = self.turn or self.turns.get(frame.rotation)
            if turn is None:
                turn = self.turns[frame.rotation] = turn_of(frame)
            look = look_of(frame, self.aspect or self.decoder.sample_aspect_ratio, self.crop, turn)
            _check_size(*look.size[::-1])
            return look
        except NotShown as error:
            raise VideoError(str(error)) from error


def probe(path: Path) -> Probed:
    """Hash the file at `path`, count its frames and read their times; raise `VideoError`."""
    with opened(path) as file, reading():
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        with demuxer(file) as media:
            name, codec, base = media.container.format.name, media.stream.codec.canonical_name, media.time_base
            start = media.container.start_time
            by_packets = name in INDEXED and codec in ONE_TO_ONE
            timeline = _timeline_of_packets(media) if by_packets else None
        if by_frames := timeline is None:
            with demuxer(file) as media:
                timeline = _timeline_of_frames(media)
        assert timeline is not None
        times, end, look, alike = timeline
        if look is None or not times:
            raise VideoError("no frame can be decoded")
        found = Probe(
            sha256=digest,
            mark=mark(file),
            num_frames=len(times),
            origin=times[0],
            look=look,
            codec=codec,
            container=name,
            # AVI and raw streams number pictures in decoding order, which shifts them all.
            start_us=0 if start is None or name == "avi" else max(0, microseconds(times[0], base) - start),
            end_us=0
            if (name in IMAGE_FORMATS and len(times) == 1) or end <= times[-1]
            else microseconds(end - times[0], base),
            intact=by_frames and alike,
            one_to_one=not by_frames and all(a < b for a, b in pairwise(times)),
        )
        return Probed(found, array("q", (microseconds(time - times[0], base) for time in times)))


@contextmanager
def opened(path: Path) -> Iterator[FileIO]:
    """Open the regular file at `path` once; all reading goes through this descriptor.

    Raise `VideoError`; a file that changed while it was read is a transient failure.
    """
    try:
        file = open_regular(path)
    except ValueError as error:
        raise VideoError(f"cannot open: {error}") from error
    except OSError as error:
        raise VideoError(f"cannot open: {error.strerror}", permanent=error.errno in BAD_NAMES) from error
    with file:
        before = mark(file)
        try:
            yield file
        finally:
            if mark(file) != before:
                raise VideoError("it changed while it was read", permanent=False)


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
def demuxer(file: FileIO) -> Iterator[Media]:
    """Open PyAV on `file` from its start, with the listed formats only; no second file is ever opened."""
    import av

    file.seek(0)
    animated_webp = (head := file.read(21))[8:16] == b"WEBPVP8X" and bool(head[20] & 2)
    file.seek(0)
    options = {"format_whitelist": ",".join((VIDEO_FORMATS, *IMAGE_FORMATS))}
    try:
        source = av.open(file, "r", options=options, io_open=_refuse, metadata_errors="replace", buffer_size=2**18)
    except av.ArgumentError as error:  # FFmpeg knows the format, and the list does not
        raise VideoError("not a video of a known container: convert it: ffmpeg -i VIDEO NEW.mp4") from error
    except av.FFmpegError as error:
        raise VideoError(f"not a video: {error.strerror}") from error
    with source:
        stream = source.streams.best("video")
        if not isinstance(stream, av.VideoStream) or stream.disposition & av.stream.Disposition.attached_pic:
            raise VideoError("not a video: no moving pictures in it")
        if (decoder := stream.codec_context) is None:
            raise VideoError("no decoder for its codec: convert it: ffmpeg -i VIDEO NEW.mp4")
        _check_size(stream.width, stream.height)
        if stream.metadata.get("alpha_mode") == "1" and decoder.name in ALPHA_DECODERS:
            decoder = cast("VideoCodecContext", av.CodecContext.create(ALPHA_DECODERS[decoder.name], "r"))
        # The pool gives the parallelism; further threads would only take memory from the limit.
        decoder.thread_type, decoder.thread_count = "NONE", 1
        aspect = stream.sample_aspect_ratio
        if aspect == decoder.sample_aspect_ratio:
            aspect = None
        turn = _exif_turn(file) if source.format.name in IMAGE_FORMATS else None
        crop = _crop(source, stream.index) if source.format.name in INDEXED else (0, 0, 0, 0)
        yield Media(file, source, stream, decoder, crop, aspect, turn, animated_webp)


def _exif_turn(file: FileIO) -> tuple[int, bool]:
    """Return rotation and mirroring of an image by its EXIF orientation."""
    from PIL import ExifTags, Image

    place = file.tell()
    file.seek(0)
    orientation = 1
    with suppress(OSError, ValueError, SyntaxError), Image.open(file) as image:  # FFmpeg may read it nevertheless
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    file.seek(place)
    return EXIF_TURNS[orientation - 1] if orientation in range(1, 9) else EXIF_TURNS[0]


def _crop(source: Any, index: int) -> tuple[int, int, int, int]:
    """Return top, bottom, left and right of the container's crop, which PyAV shows in FFmpeg's description only."""
    import av

    level = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)
    description = source.dumps_format().partition(f"Stream #0:{index}")[2].partition("Stream #0:")[0]
    av.logging.set_level(level)
    found = re.search(r"Frame Cropping: (\d+)/(\d+)/(\d+)/(\d+)", description)
    left, right, top, bottom = map(int, found.groups()) if found else (0, 0, 0, 0)
    return top, bottom, left, right


def _refuse(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    raise VideoError("not a video: it refers to another file")


def _check_size(width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE:
        raise VideoError(f"too large: {width}x{height} pixels, more than {MAX_SIDE} a side")


Timeline = tuple[list[int], int, Look | None, bool]


def _timeline_of_packets(media: Media) -> Timeline | None:
    """Return the times of the displayed packets in ticks, the end of the last, and the first frame's look.

    Return None where packets do not give the displayed frames: one has no time, or precedes the first keyframe.
    """
    times: list[int] = []
    look: Look | None = None
    begin: int | None = None
    end = 0
    for packet in media.container.demux(media.stream):
        if look is None and (frame := next(iter(media.decoder.decode(packet)), None)):
            look = media.look(frame)
        if packet.size == 0:
            continue
        if packet.pts is None or (begin is None and not packet.is_keyframe):
            return None
        begin = packet.pts if begin is None else begin
        if packet.pts < begin:
            return None
        if not packet.is_discard:
            times.append(packet.pts)
            end = max(end, packet.pts + (packet.duration or 0))
        _check_count(len(times))
    return sorted(times), end, look, False


def _timeline_of_frames(media: Media) -> Timeline:
    """Return the times of the decoded frames in ticks, the end of the last, and the first frame's look."""
    times: list[int] = []
    look: Look | None = None
    alike, end = True, 0
    for frame in displayed(media):
        now = media.look(frame)
        look = look or now
        alike = alike and now == look
        assert frame.pts is not None
        times.append(frame.pts)
        end = max(end, frame.pts + (frame.duration or 0))
        _check_count(len(times))
    if media.container.format.name == "avi":
        times.sort()  # it numbers packets in decoding order: right times in the wrong order
    elif any(a > b for a, b in pairwise(times)):
        raise VideoError("time stamps go backwards")
    return times, end, look, alike


def displayed(media: Media) -> Iterator["VideoFrame"]:
    """Yield the decoded frames in display order with their times; raise `VideoError` at one that conceals an error.

    A stream without any time stamps has the constant rate that FFmpeg finds in it.
    """
    frames = _webp_frames(media) if media.animated_webp else _stream_frames(media)
    timed = True
    for number, frame in enumerate(frames):
        check_frame(frame, number)
        timed = timed if number else frame.pts is not None
        if frame.pts is None and not timed and (rate := media.stream.guessed_rate):
            frame.pts = round(number / (rate * media.time_base))
        if frame.pts is None:
            raise VideoError(f"no time stamp: of frame {number}")
        yield frame


def _stream_frames(media: Media) -> Iterator["VideoFrame"]:
    for packet in media.container.demux(media.stream):
        yield from media.decoder.decode(packet)


def _webp_frames(media: Media) -> Iterator["VideoFrame"]:
    """Yield the pictures of an animated WebP file, which FFmpeg does not decode."""
    import av
    from PIL import Image

    media.file.seek(0)
    time = 0
    with Image.open(media.file) as image:
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            frame = av.VideoFrame.from_ndarray(np.asarray(image.convert("RGBA")), format="rgba")
            frame.pts, frame.time_base, frame.duration = time, Fraction(1, 1000), int(image.info["duration"])
            time += frame.duration
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

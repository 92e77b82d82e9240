"""A probed video file -> exact uint8 frames, or a `VideoError` with one line.

PyAV is the reference. It decodes in sequence from the start, or from a keyframe before the first wanted frame if every
frame has a packet of its own. decord decodes only where its contiguous reading gives the same bytes (the table in
tests/shared/media/test_probe.py) and PyAV has found no damage, since decord returns concealed frames silently. Its
sampled `get_batch` returns wrong frames on open GOPs and is never called. Files are untrusted: decode them in a `pool`.
"""

import hashlib
import importlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from shared.media.picture import Pixels, Scaled, deinterlaced, fit, rgb_picture
from shared.media.probe import (
    INDEXED,
    Media,
    Probe,
    VideoError,
    check_frame,
    demuxer,
    displayed,
    mark,
    microseconds,
    opened,
    reading,
)

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

DECORD_CODECS = ("h264", "hevc", "mpeg4")
DECORD_CONTAINERS = (*INDEXED, "avi")
DECORD_PIXELS = ("yuv420p", "yuvj420p", "yuv422p", "yuv444p")
"""decord rounds the colors of other formats differently (up to 71 of 255 on 10-bit, 27 on interlaced chroma)."""
NOT_EXACT = "decord is not exact here"

Decoder = Literal["pyav", "decord"]
Requested = Literal["auto", "pyav", "decord"]
Numbered = Iterator[tuple[int | None, "VideoFrame", Media]]
"""Frames in display order; those that are not wanted may have no number."""


class Rows(Protocol):
    """An array of pictures, in memory or in a file."""

    def __setitem__(self, row: int, picture: Pixels) -> None: ...


def choose_decoder(probe: Probe, requested: Requested) -> Decoder:
    """Return the decoder; `auto` takes decord where it is exact and the file is known to be intact.

    Raise `VideoError` where decord is requested and not exact. PyAV is also faster: decord converts every frame.
    """
    if requested == "pyav" or (requested == "auto" and not probe.intact):
        return "pyav"
    exact = {
        f"codec {probe.codec}": probe.codec in DECORD_CODECS,
        f"container {probe.container}": probe.container in DECORD_CONTAINERS,
        f"pixel format {probe.look.pixel_format}": probe.look.pixel_format in DECORD_PIXELS,
        "its pictures are not shown as they are stored": probe.look.plain,
        "decord is not installed": importlib.util.find_spec("decord") is not None,
    }
    reasons = [name for name, is_exact in exact.items() if not is_exact]
    if requested == "decord" and reasons:
        raise VideoError(f"{NOT_EXACT}: {reasons[0]}")
    return "pyav" if reasons else "decord"


def shape_of(probe: Probe, scaled: Scaled | None) -> tuple[Scaled, tuple[int, int, int], "np.dtype[Any]"]:
    """Return the scaling (by default to the displayed size), and the shape and type of one picture."""
    height, width = probe.look.size
    scaled = scaled or Scaled((height, width), (0, 0, height, width))
    as_stored = scaled.size == probe.look.pixels and not probe.look.converts
    return scaled, (*scaled.part[2:], 3), np.dtype(np.uint8 if as_stored else np.float32)


def decode_rows(
    path: Path,
    probe: Probe,
    indices: Sequence[int],
    timestamps_us: Sequence[int],
    decoder: Requested,
    scaled: Scaled,
    rows: Rows,
) -> Decoder:
    """Decode the displayed frames `indices` (ascending, may repeat) into `rows`; return the decoder.

    One picture at a time is held. `timestamps_us` are the probed times of these frames. `auto` falls back from decord
    to PyAV where decord disagrees with `probe`. Raise `VideoError`, permanent for a frame at another time, transient
    for another file than probed.
    """
    assert len(indices) > 0 and all(a <= b for a, b in pairwise(indices))
    assert indices[0] >= 0 and indices[-1] < probe.num_frames
    times = dict(zip(indices, timestamps_us, strict=True))

    def collect(pictures: Iterable[tuple[int, Pixels]]) -> None:
        row = 0
        for number, picture in pictures:
            fitted = fit(picture, probe.look, scaled)
            while row < len(indices) and number == indices[row]:
                rows[row] = fitted
                row += 1
        assert row == len(indices)

    with opened(path) as file, reading():
        if mark(file) != probe.mark and hashlib.file_digest(file, "sha256").hexdigest() != probe.sha256:
            raise VideoError("it changed after it was probed", permanent=False)
        if choose_decoder(probe, decoder) == "decord":
            if not probe.intact:
                for _ in _pictures(_from_the_start(file, probe, times), probe, times):
                    pass
            try:
                collect(_decode_with_decord(file, path, probe, times))
                return "decord"
            except VideoError:  # PyAV decodes where decord disagrees with the probe
                if decoder == "decord":
                    raise
        if probe.one_to_one and indices[0] > 0:
            try:
                with reading():
                    collect(_pictures(_from_a_keyframe(file, probe, times), probe, times))
                    return "pyav"
            except VideoError as error:  # decoding from the start may succeed, or gives the reason
                if not error.permanent:
                    raise
        collect(_pictures(_from_the_start(file, probe, times), probe, times))
        return "pyav"


def _pictures(frames: Numbered, probe: Probe, times: Mapping[int, int]) -> Iterator[tuple[int, Pixels]]:
    """Yield the pictures of the frames numbered in `times`; only an interlaced one needs its neighbours."""
    last = max(times)
    before: VideoFrame | None = None
    ahead: tuple[int | None, VideoFrame, Media] | None = None
    while (now := ahead or next(frames, None)) is not None:
        (number, frame, media), ahead = now, None
        if number is not None and number in times:
            look = media.look(frame)
            if (look.rotation, look.mirrored) != (probe.look.rotation, probe.look.mirrored):
                raise VideoError(f"the rotation changes: at frame {number}")
            if (look.pixels, look.size) != (probe.look.pixels, probe.look.size):
                raise VideoError(f"the frame size changes: at frame {number}")
            if look.colors != probe.look.colors:
                raise VideoError(f"the transfer curve or the primaries change: at frame {number}")
            if look.interlaced:
                if before is None and number > 0:
                    raise VideoError(f"interlaced, and nothing precedes it: at frame {number}")
                ahead = next(frames, None)
                frame = deinterlaced(before, frame, ahead[1] if ahead else None)
            yield number, rgb_picture(frame, look)
        before = now[1]
        if number == last:
            return


def _from_the_start(file: FileIO, probe: Probe, times: Mapping[int, int]) -> Numbered:
    """Yield all frames; raise `VideoError` at one of `times` with another time."""
    count = 0
    with demuxer(file) as media:
        for number, frame in enumerate(displayed(media)):
            count += 1
            timed = number in times and media.container.format.name != "avi"
            if timed and _time(frame, probe, media) != times[number]:
                raise VideoError(f"unreliable time stamps: frame {number} comes at another time than its packet says")
            yield number, frame, media
    if count <= max(times):
        raise VideoError(f"truncated: decoded {count} of {probe.num_frames} frames")


def _from_a_keyframe(file: FileIO, probe: Probe, times: Mapping[int, int]) -> Numbered:
    """Yield the same frames of a `one_to_one` file, decoding from a keyframe at or before the first of them.

    Raise `VideoError` where the packet found there does not start a new sequence, or a frame has another time.
    """
    waiting = iter(times.items())
    number, time = next(waiting)
    last = max(times)
    started = False
    with demuxer(file) as media:
        # An interlaced picture needs the one before it.
        target = probe.origin + round(Fraction(time, 1_000_000) / media.time_base) - probe.look.interlaced
        media.container.seek(target, stream=media.stream)
        for packet in media.container.demux(media.stream):
            if not started and not _starts_sequence(packet, probe.codec, media.stream):
                raise VideoError("no keyframe where the container says")
            started = True
            for frame in media.decoder.decode(packet):
                check_frame(frame, number)
                now = _time(frame, probe, media)
                if now < time or number > last:
                    yield None, frame, media
                    continue
                if now > time:
                    raise VideoError(f"unreliable time stamps: frame {number} is not where its packet says")
                yield number, frame, media
                number, time = next(waiting, (last + 1, time))
    if number <= last:
        raise VideoError("truncated")


def _starts_sequence(packet: "Packet[VideoStream]", codec: str, stream: "VideoStream") -> bool:
    """Return True if no picture from this one on, in display order, refers to an earlier one.

    A container may call any picture a keyframe. Decoders of VP9 and AV1 refuse a missing reference, but those of H.264
    and HEVC conceal it: there the packet must hold an IDR (Rec. ITU-T H.264, 7.4.1.2.4) or IRAP picture (H.265,
    7.4.2.2). The boxes avcC and hvcC (ISO 14496-15) give the number of bytes of each NAL unit's length.
    """
    if not packet.is_keyframe:
        return False
    if codec not in ("h264", "hevc"):
        return True
    extradata, data = stream.codec_context.extradata, bytes(packet)
    place = 4 if codec == "h264" else 21
    if not extradata or extradata[0] != 1 or len(extradata) <= place:
        return False
    size = (extradata[place] & 3) + 1
    start = 0
    while start + size < len(data):
        head = data[start + size]
        if (head & 31) == 5 if codec == "h264" else 16 <= (head >> 1 & 63) <= 21:
            return True
        start += size + int.from_bytes(data[start : start + size], "big")
    return False


def _time(frame: "VideoFrame", probe: Probe, media: Media) -> int:
    """Return microseconds since the first displayed frame."""
    if frame.pts is None:
        raise VideoError("a frame has no time stamp")
    return microseconds(frame.pts - probe.origin, media.time_base)


def _decode_with_decord(
    file: FileIO, path: Path, probe: Probe, times: Mapping[int, int]
) -> Iterator[tuple[int, Pixels]]:
    """Yield the pictures numbered in `times`; raise `VideoError` where decord disagrees with the probe."""
    decord: Any = importlib.import_module("decord")
    decord.logging.set_level(decord.logging.QUIET)
    same_file = Path(f"/proc/self/fd/{file.fileno()}")

    try:
        reader = decord.VideoReader(str(same_file if same_file.exists() else path), ctx=decord.cpu(0), num_threads=1)
        if len(reader) != probe.num_frames:
            raise VideoError(f"{NOT_EXACT}: it counts {len(reader)} frames, PyAV {probe.num_frames}")
        starts = reader.get_frame_timestamp(range(len(reader)))[:, 0] * 1e6
        if any(abs(starts[number] - starts[0] - time) > 1000 for number, time in times.items()):
            raise VideoError(f"{NOT_EXACT}: its frame times differ from PyAV's")
        for number in range(max(times) + 1):
            frame = reader.next()
            if frame.shape != (*probe.look.stored, 3):
                raise VideoError(f"{NOT_EXACT}: its frame {number} has the shape {frame.shape}")
            if number in times:
                yield number, frame.asnumpy()
    except (decord.DECORDError, RuntimeError, StopIteration) as error:
        raise VideoError(f"{NOT_EXACT}: {str(error).partition(chr(10))[0]}") from error

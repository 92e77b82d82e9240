"""A probed video file -> exact uint8 frames, or one line that says why not.

PyAV is the reference and decodes in sequence, from the start or, where every frame has a packet of its own, from the
last picture before the first wanted frame at which decoding can begin. decord decodes only where its contiguous reading
gives the same bytes (the table in tests/precompute/test_video.py) and PyAV has found no damage, since decord hands out
concealed frames without a word; its sampled `get_batch` returns wrong frames on open GOPs, silently, and is never
called. Files are untrusted: decode them in a `pool`.
"""

import hashlib
import importlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from precompute.video.probe import (
    INDEXED,
    BadVideo,
    MachineFault,
    Probe,
    check_frame,
    demuxer,
    displayed,
    mark,
    microseconds,
    opened,
    reading,
    rotation,
)

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

DECORD_CODECS = ("h264", "hevc", "mpeg4")
DECORD_CONTAINERS = (*INDEXED, "avi")
DECORD_PIXELS = ("yuv420p", "yuvj420p", "yuv422p", "yuv444p")
"""decord rounds other formats' colours differently (up to 71 of 255 on 10-bit, 27 on interlaced chroma)."""

Decoder = Literal["pyav", "decord"]
Requested = Literal["auto", "pyav", "decord"]


class _Unproven(Exception):
    """decord does not agree with the probe; PyAV decides."""


def choose_decoder(probe: Probe, requested: Requested) -> Decoder:
    """Who decodes; `auto` takes decord where it is exact and the file is known to be intact.

    Raises `BadVideo` where decord is demanded and not exact. (PyAV is also the faster: decord converts every frame.)
    """
    reason = _against_decord(probe)
    if requested == "decord" and reason:
        raise BadVideo(f"decord is not exact here: {reason}")
    return "decord" if requested == "decord" or (requested == "auto" and probe.intact and not reason) else "pyav"


def decode(
    path: Path, probe: Probe, indices: Sequence[int], timestamps_us: Sequence[int], decoder: Requested
) -> tuple[np.ndarray, Decoder]:
    """The displayed frames `indices` (ascending, may repeat), probed at `timestamps_us`: uint8 [F, H, W, 3] RGB.

    Returns them with the decoder that made them; `auto` turns from decord to PyAV where decord disagrees with `probe`.
    Stops after the last index. Raises `BadVideo`, also for a frame at another time than probed, or `MachineFault`, also
    for another file than probed.
    """
    assert len(indices) > 0 and all(a <= b for a, b in pairwise(indices))
    assert indices[0] >= 0 and indices[-1] < probe.num_frames
    times = dict(zip(indices, timestamps_us, strict=True))
    with opened(path) as file, reading():
        if mark(file) != probe.mark and hashlib.file_digest(file, "sha256").hexdigest() != probe.sha256:
            raise MachineFault("it changed after it was probed")
        if choose_decoder(probe, decoder) == "decord":
            if not probe.intact:
                for _ in _from_the_start(file, probe, times):
                    pass
            try:
                return _decode_with_decord(file, path, probe, indices, times), "decord"
            except _Unproven as error:
                if decoder == "decord":
                    raise BadVideo(f"decord is not exact here: {error}") from error
        return _decode_with_pyav(file, probe, indices, times), "pyav"


def _decode_with_pyav(file: FileIO, probe: Probe, indices: Sequence[int], times: Mapping[int, int]) -> np.ndarray:
    if probe.one_to_one and indices[0] > 0:
        try:
            with reading():
                return _pictures(_from_a_keyframe(file, probe, times), probe, indices)
        except BadVideo:
            pass  # from the start it may yet go well, or else say what is wrong
    return _pictures(_from_the_start(file, probe, times), probe, indices)


def _pictures(frames: Iterable[tuple[int, "VideoFrame"]], probe: Probe, indices: Sequence[int]) -> np.ndarray:
    """`frames` are numbered; those of `indices`, as often as they stand there."""
    out = np.empty((len(indices), probe.height, probe.width, 3), np.uint8)
    row = 0
    for number, frame in frames:
        picture = _picture(frame, probe, number)
        while row < len(indices) and number == indices[row]:
            out[row] = picture
            row += 1
    assert row == len(indices)
    return out


def _from_the_start(file: FileIO, probe: Probe, times: Mapping[int, int]) -> Iterator[tuple[int, "VideoFrame"]]:
    """The frames numbered in `times`; raises `BadVideo` at one that comes at another time."""
    decoded, last = 0, max(times)
    with demuxer(file) as (container, stream):
        for number, frame in enumerate(displayed(container, stream)):
            decoded += 1
            if number not in times:
                continue
            if container.format.name != "avi" and _time(frame, probe, stream) != times[number]:
                raise BadVideo(f"unreliable time stamps: frame {number} comes at another time than its packet says")
            yield number, frame
            if number == last:
                return
    raise BadVideo(f"truncated: decoded {decoded} of {probe.num_frames} frames")


def _from_a_keyframe(file: FileIO, probe: Probe, times: Mapping[int, int]) -> Iterator[tuple[int, "VideoFrame"]]:
    """The same, of a file whose frames have each a packet and a time of its own, without decoding all before.

    Raises `BadVideo` where decoding does not begin anew at or before the first of them, or brings any at another time.
    """
    waiting = iter(times.items())
    number, time = next(waiting)
    last = max(times)
    begun = False
    with demuxer(file) as (container, stream):
        container.seek(probe.origin + _ticks(time, stream), stream=stream)
        for packet in container.demux(stream):
            if not begun and not _begins_anew(packet, probe.codec, stream):
                raise BadVideo("no keyframe where the container says")
            begun = True
            for frame in packet.decode():
                check_frame(frame, number)
                if (now := _time(frame, probe, stream)) < time:
                    continue
                if now > time:
                    raise BadVideo(f"unreliable time stamps: frame {number} is not where its packet says")
                yield number, frame
                if number == last:
                    return
                number, time = next(waiting)
    raise BadVideo("truncated")


def _begins_anew(packet: "Packet[VideoStream]", codec: str, stream: "VideoStream") -> bool:
    """Whether no picture from this one on, in the order of display, refers to one before it.

    A container may call any picture a keyframe. Decoders of VP9 and AV1 refuse a missing reference, but those of H.264
    and HEVC make one up: here it has to be an IDR (Rec. ITU-T H.264, 7.4.1.2.4) or IRAP picture (H.265, 7.4.2.2). The
    boxes avcC and hvcC (ISO 14496-15) say how many bytes the length of each NAL unit has.
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


def _time(frame: "VideoFrame", probe: Probe, stream: "VideoStream") -> int:
    """Microseconds since the first displayed frame."""
    if frame.pts is None or stream.time_base is None:
        raise BadVideo("a frame has no time stamp")
    return microseconds(frame.pts - probe.origin, stream.time_base)


def _ticks(time_us: int, stream: "VideoStream") -> int:
    """A time in the stream's time base, to the nearest tick."""
    assert stream.time_base is not None
    return round(Fraction(time_us, 1_000_000) / stream.time_base)


def _picture(frame: "VideoFrame", probe: Probe, number: int) -> np.ndarray:
    """uint8 [H, W, 3] RGB, turned as displayed."""
    if rotation(frame) != probe.rotation:
        raise BadVideo(f"the rotation changes: at frame {number}")
    # One thread: a converter that is not collected yet would keep its threads, and their stacks count as memory.
    stored = frame.reformat(format="rgb24", threads=1).to_ndarray()
    picture = np.rot90(stored, probe.rotation // 90)
    if picture.shape[:2] != (probe.height, probe.width):
        raise BadVideo(f"the frame size changes: at frame {number}")
    return picture


def _decode_with_decord(
    file: FileIO, path: Path, probe: Probe, indices: Sequence[int], times: Mapping[int, int]
) -> np.ndarray:
    decord: Any = importlib.import_module("decord")
    decord.logging.set_level(decord.logging.QUIET)
    same_file = Path(f"/proc/self/fd/{file.fileno()}")
    try:
        reader = decord.VideoReader(str(same_file if same_file.exists() else path), ctx=decord.cpu(0), num_threads=1)
        if len(reader) != probe.num_frames:
            raise _Unproven(f"it counts {len(reader)} frames, PyAV {probe.num_frames}")
        starts = reader.get_frame_timestamp(range(len(reader)))[:, 0] * 1e6
        if any(abs(starts[number] - starts[0] - time) > 1000 for number, time in times.items()):
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

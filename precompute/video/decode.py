"""A probed video file -> exact uint8 frames, or a `VideoError` with one line.

PyAV is the reference. It decodes in sequence from the start, or from a keyframe before the first wanted frame if every
frame has a packet of its own. decord decodes only where its contiguous reading gives the same bytes (the table in
tests/precompute/video/test_probe.py) and PyAV has found no damage, since decord returns concealed frames silently. Its
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
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from precompute.video.probe import (
    INDEXED,
    Probe,
    VideoError,
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
"""decord rounds the colors of other formats differently (up to 71 of 255 on 10-bit, 27 on interlaced chroma)."""
NOT_EXACT = "decord is not exact here"

Decoder = Literal["pyav", "decord"]
Requested = Literal["auto", "pyav", "decord"]


def choose_decoder(probe: Probe, requested: Requested) -> Decoder:
    """Return the decoder; `auto` takes decord where it is exact and the file is known to be intact.

    Raise `VideoError` where decord is requested and not exact. PyAV is also faster: decord converts every frame.
    """
    if requested == "pyav" or (requested == "auto" and not probe.intact):
        return "pyav"
    exact = {
        f"codec {probe.codec}": probe.codec in DECORD_CODECS,
        f"container {probe.container}": probe.container in DECORD_CONTAINERS,
        f"pixel format {probe.pixel_format}": probe.pixel_format in DECORD_PIXELS,
        f"rotation {probe.rotation}": probe.rotation == 0,
        "decord is not installed": importlib.util.find_spec("decord") is not None,
    }
    reasons = [name for name, is_exact in exact.items() if not is_exact]
    if requested == "decord" and reasons:
        raise VideoError(f"{NOT_EXACT}: {reasons[0]}")
    return "pyav" if reasons else "decord"


def decode(
    path: Path, probe: Probe, indices: Sequence[int], timestamps_us: Sequence[int], decoder: Requested
) -> tuple[np.ndarray, Decoder]:
    """Decode the displayed frames `indices` (ascending, may repeat) to uint8 [F, H, W, 3] RGB; return the decoder too.

    `timestamps_us` are the probed times of these frames. `auto` falls back from decord to PyAV where decord disagrees
    with `probe`. Raise `VideoError`, permanent for a frame at another time, transient for another file than probed.
    """
    assert len(indices) > 0 and all(a <= b for a, b in pairwise(indices))
    assert indices[0] >= 0 and indices[-1] < probe.num_frames
    times = dict(zip(indices, timestamps_us, strict=True))
    with opened(path) as file, reading():
        if mark(file) != probe.mark and hashlib.file_digest(file, "sha256").hexdigest() != probe.sha256:
            raise VideoError("it changed after it was probed", permanent=False)
        if choose_decoder(probe, decoder) == "decord":
            if not probe.intact:
                for _ in _from_the_start(file, probe, times):
                    pass
            try:
                return _decode_with_decord(file, path, probe, indices, times), "decord"
            except VideoError:  # PyAV decodes where decord disagrees with the probe
                if decoder == "decord":
                    raise
        if probe.one_to_one and indices[0] > 0:
            try:
                with reading():
                    return _collect(_from_a_keyframe(file, probe, times), probe, indices), "pyav"
            except VideoError as error:  # decoding from the start may succeed, or gives the reason
                if not error.permanent:
                    raise
        return _collect(_from_the_start(file, probe, times), probe, indices), "pyav"


def _collect(pictures: Iterable[tuple[int, np.ndarray]], probe: Probe, indices: Sequence[int]) -> np.ndarray:
    """Return the numbered pictures of `indices`, repeated as there: uint8 [F, H, W, 3]."""
    out = np.empty((len(indices), probe.height, probe.width, 3), np.uint8)
    row = 0
    for number, picture in pictures:
        while row < len(indices) and number == indices[row]:
            out[row] = picture
            row += 1
    assert row == len(indices)
    return out


def _from_the_start(file: FileIO, probe: Probe, times: Mapping[int, int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the pictures numbered in `times`; raise `VideoError` at one with another time."""
    decoded, last = 0, max(times)
    with demuxer(file) as (container, stream):
        for number, frame in enumerate(displayed(container, stream)):
            decoded += 1
            if number not in times:
                continue
            if container.format.name != "avi" and _time(frame, probe, stream) != times[number]:
                raise VideoError(f"unreliable time stamps: frame {number} comes at another time than its packet says")
            yield number, _picture(frame, probe, number)
            if number == last:
                return
    raise VideoError(f"truncated: decoded {decoded} of {probe.num_frames} frames")


def _from_a_keyframe(file: FileIO, probe: Probe, times: Mapping[int, int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the same pictures of a `one_to_one` file, decoding from a keyframe at or before the first of them.

    Raise `VideoError` where the packet found there does not start a new sequence, or a frame has another time.
    """
    waiting = iter(times.items())
    number, time = next(waiting)
    last = max(times)
    started = False
    with demuxer(file) as (container, stream):
        assert stream.time_base is not None
        container.seek(probe.origin + round(Fraction(time, 1_000_000) / stream.time_base), stream=stream)
        for packet in container.demux(stream):
            if not started and not _starts_sequence(packet, probe.codec, stream):
                raise VideoError("no keyframe where the container says")
            started = True
            for frame in packet.decode():
                check_frame(frame, number)
                if (now := _time(frame, probe, stream)) < time:
                    continue
                if now > time:
                    raise VideoError(f"unreliable time stamps: frame {number} is not where its packet says")
                yield number, _picture(frame, probe, number)
                if number == last:
                    return
                number, time = next(waiting)
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


def _time(frame: "VideoFrame", probe: Probe, stream: "VideoStream") -> int:
    """Return microseconds since the first displayed frame."""
    if frame.pts is None or stream.time_base is None:
        raise VideoError("a frame has no time stamp")
    return microseconds(frame.pts - probe.origin, stream.time_base)


def _picture(frame: "VideoFrame", probe: Probe, number: int) -> np.ndarray:
    """Convert a frame to uint8 [H, W, 3] RGB, rotated as displayed."""
    if rotation(frame) != probe.rotation:
        raise VideoError(f"the rotation changes: at frame {number}")
    # One thread: a converter that is not collected yet keeps its threads, and their stacks count as memory.
    stored = frame.reformat(format="rgb24", threads=1).to_ndarray()
    picture = np.rot90(stored, probe.rotation // 90)
    if picture.shape[:2] != (probe.height, probe.width):
        raise VideoError(f"the frame size changes: at frame {number}")
    return picture


def _decode_with_decord(
    file: FileIO, path: Path, probe: Probe, indices: Sequence[int], times: Mapping[int, int]
) -> np.ndarray:
    decord: Any = importlib.import_module("decord")
    decord.logging.set_level(decord.logging.QUIET)
    same_file = Path(f"/proc/self/fd/{file.fileno()}")

    def pictures(reader: Any) -> Iterator[tuple[int, np.ndarray]]:
        for number in range(max(times) + 1):
            frame = reader.next()
            if frame.shape != (probe.height, probe.width, 3):
                raise VideoError(f"{NOT_EXACT}: its frame {number} has the shape {frame.shape}")
            if number in times:
                yield number, frame.asnumpy()

    try:
        reader = decord.VideoReader(str(same_file if same_file.exists() else path), ctx=decord.cpu(0), num_threads=1)
        if len(reader) != probe.num_frames:
            raise VideoError(f"{NOT_EXACT}: it counts {len(reader)} frames, PyAV {probe.num_frames}")
        starts = reader.get_frame_timestamp(range(len(reader)))[:, 0] * 1e6
        if any(abs(starts[number] - starts[0] - time) > 1000 for number, time in times.items()):
            raise VideoError(f"{NOT_EXACT}: its frame times differ from PyAV's")
        return _collect(pictures(reader), probe, indices)
    except (decord.DECORDError, RuntimeError, StopIteration) as error:
        raise VideoError(f"{NOT_EXACT}: {str(error).partition(chr(10))[0]}") from error

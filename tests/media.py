"""Clips whose every frame carries its index as a bar code that survives lossy coding, and files that only look like it.

The upper part of a frame shows the index as dark and bright bars, most significant bit at the left; the lower part
shows the complement, so a picture that is turned, mirrored, blended of two frames or damaged has no readable index.
"""

import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from shared.media.decode import Decoder, Requested, decode_rows, shape_of
from shared.media.probe import Probed

BITS = 10
DARK, BRIGHT = 40, 215


@dataclass(frozen=True)
class Case:
    """A clip to write; `decord` says whether decord is exact on it, `tick` is the container's clock in microseconds."""

    file: str
    decord: bool
    tick: int = 0
    rate: int = 30
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.file


def _case(file: str, decord: bool, tick: int = 0, **settings: Any) -> Case:
    return Case(file, decord, tick, int(settings.get("rate", 30)), settings)


CASES = [
    _case("h264.mp4", True),
    _case("h264.mkv", True, 1000),
    _case("h264_open_gop.mp4", True, open_gop=True, frames=40),
    _case("h264_gop_1.mp4", True, gop=1),
    _case("h264_fragments.mp4", True, muxer={"movflags": "frag_keyframe+empty_moov"}),
    _case("h264_odd.mp4", True, pixels="yuv444p", height=47, width=81),
    _case("h264_422.mp4", True, pixels="yuv422p"),
    _case("hevc_open_gop.mp4", True, codec="libx265", frames=40, bframes=4, open_gop=True),
    _case("mpeg4.mp4", True, codec="mpeg4"),
    _case("mpeg4.avi", True, codec="mpeg4", bframes=0),
    _case("mpeg4_bframes.avi", False, codec="mpeg4"),
    _case("h264.avi", False),
    _case("h264.flv", False, 1000),
    _case("h264.ts", False),
    _case("h264_10_bit.mp4", False, pixels="yuv420p10le"),
    _case("h264_interlaced.mp4", False, options={"flags": "+ildct+ilme"}),
    _case("hevc_10_bit.mp4", False, codec="libx265", pixels="yuv420p10le"),
    _case("mpeg2.ts", False, codec="mpeg2video"),
    _case("vp9.webm", False, 1000, codec="libvpx-vp9"),
    _case("vp8.webm", False, 1000, codec="libvpx"),
    _case("av1.mp4", False, codec="libsvtav1", height=64, width=160),
    _case("ffv1.mkv", False, 1000, codec="ffv1"),
    _case("ten_a_second.gif", False, codec="gif", pixels="rgb8", rate=10),
    _case("one_frame.mp4", True, frames=1),
    _case("image.png", False, codec="png", pixels="rgb24", frames=1, container="image2"),
    _case("image.jpg", False, codec="mjpeg", pixels="yuvj420p", frames=1, container="image2"),
    _case("image.webp", False, codec="libwebp", pixels="bgra", frames=1, container="webp"),
]


def draw(index: int, height: int, width: int) -> np.ndarray:
    """Draw frame `index` as uint8 [H, W, 3]: bars, a moving color ramp, and the bars' complement."""
    assert 0 <= index < 2**BITS
    bits = np.array([index >> (BITS - 1 - place) & 1 for place in range(BITS)])
    bars = np.where(bits[np.arange(width) * BITS // width] == 1, BRIGHT, DARK)
    picture = np.empty((height, width, 3), np.uint8)
    picture[: height * 5 // 12] = bars[None, :, None]
    picture[height * 7 // 12 :] = (DARK + BRIGHT - bars)[None, :, None]
    ramp = (np.arange(width) * 200 // width + index * 3) % 200 + 20
    picture[height * 5 // 12 : height * 7 // 12] = np.stack([ramp, 240 - ramp, np.full(width, 60)], axis=-1)
    return picture


def read(picture: np.ndarray) -> int | None:
    """Return the index that a decoded picture (uint8 [H, W, 3]) shows, None where the two bar codes disagree."""
    height, width, _ = picture.shape
    codes = []
    for rows in (slice(height // 12, height * 4 // 12), slice(height * 8 // 12, height * 11 // 12)):
        centres = [(2 * place + 1) * width // (2 * BITS) for place in range(BITS)]
        levels = [float(picture[rows, max(centre - 1, 0) : centre + 2].mean()) for centre in centres]
        if any(118 < level < 137 for level in levels):
            return None
        codes.append(sum(1 << (BITS - 1 - place) for place, level in enumerate(levels) if level > 127))
    return codes[0] if codes[0] ^ codes[1] == 2**BITS - 1 else None


def indices_of(frames: np.ndarray) -> list[int | None]:
    """`read` of every frame of uint8 [F, H, W, 3]."""
    return [read(frame) for frame in frames]


def decode_probed(
    path: Path, found: Probed, indices: Sequence[int], decoder: Requested = "pyav"
) -> tuple[np.ndarray, Decoder]:
    """Decode frames to [F, H, W, 3] at their displayed size and at the times that the probe found."""
    scaled, shape, dtype = shape_of(found.probe, None)
    out = np.empty((len(indices), *shape), dtype)
    times = [found.timestamps_us[index] for index in indices]
    return out, decode_rows(path, found.probe, indices, times, decoder, scaled, out)


def write_clip(
    path: Path,
    *,
    frames: int = 30,
    height: int = 48,
    width: int = 80,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    rate: Fraction | int = 30,
    times: Sequence[int] | None = None,
    gop: int = 12,
    bframes: int = 2,
    open_gop: bool = False,
    rotation: int = 0,
    container: str | None = None,
    audio_seconds: float = 0,
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
) -> Path:
    """Write a bar-coded clip; `options` go to the encoder, `muxer` to the container.

    `times` are presentation times in milliseconds (variable rate). `rotation` is that of the display matrix, in degrees
    counter-clockwise.
    """
    settings = dict(options or {})
    if codec == "libx264":
        settings = {"preset": "ultrafast", "bf": str(bframes), "b-pyramid": "none", **settings}
        settings["x264-params"] = f"open-gop={int(open_gop)}:scenecut=0"
    if codec == "libx265":
        gops = f"keyint={gop}:min-keyint={gop}:bframes={bframes}:open-gop={int(open_gop)}"
        settings["x265-params"] = settings.get("x265-params", gops) + ":log-level=error:pools=1"
    if codec == "libsvtav1":
        settings = {"preset": "8", "crf": "20", "svtav1-params": "lp=1", **settings}  # 12 smears small bars
        os.environ["SVT_LOG"] = "1"
    if codec == "libvpx-vp9":
        settings = {"deadline": "realtime", "cpu-used": "8", **settings}
    unit = Fraction(1, 1000) if times is not None else 1 / Fraction(rate)
    with av.open(str(path), "w", format=container, options=muxer or {}) as out:
        stream: Any = out.add_stream(codec, rate=rate, options=settings)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = stream.time_base = unit
        if codec in ("mpeg4", "mpeg2video"):
            stream.codec_context.max_b_frames = bframes
            stream.codec_context.bit_rate = 2_000_000
        if rotation:
            stream.set_display_rotation(rotation)
        sound: Any = out.add_stream("aac", rate=16000) if audio_seconds else None
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(draw(index, height, width), format="rgb24")
            frame.pts = times[index] if times is not None else index
            frame.time_base = unit
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if sound:
            write_sound(out, sound, audio_seconds)
    return path


def clip(folder: Path, file: str, **settings: Any) -> Path:
    """Write the clip `file` with `settings`, once per folder."""
    path = folder / file
    return path if path.exists() else write_clip(path, **settings)


def write_case(folder: Path, case: Case | str) -> Path:
    """Write the clip of a case, or of the case of that file name."""
    found = case if isinstance(case, Case) else next(each for each in CASES if each.file == case)
    return clip(folder, found.file, **found.settings)


def write_audio(path: Path, seconds: float = 0.5) -> Path:
    """Write a file with sound and no picture."""
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("aac", rate=16000)
        write_sound(out, stream, seconds)
    return path


def write_sound(out: Any, stream: Any, seconds: float) -> None:
    for block in range(int(seconds * 16000) // 1024 + 1):
        tone = (np.sin(np.arange(1024) / 9) * 0.1).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, block * 1024
        out.mux(stream.encode(frame))
    out.mux(stream.encode(None))


def write_trimmed(path: Path, source: Path, *, hidden: int, first_packet: int = 0) -> Path:
    """Copy the packets of `source` from `first_packet` on; the first `hidden` pictures lie before time 0.

    The mov muxer hides them by an edit list, as `ffmpeg -ss T -c copy` does.
    """
    with av.open(str(source)) as reader, av.open(str(path), "w") as out:
        stream = reader.streams.video[0]
        copy = out.add_stream_from_template(stream)
        packets = [packet for packet in reader.demux(stream) if packet.pts is not None][first_packet:]
        origin = sorted(packet.pts for packet in packets if packet.pts is not None)[hidden]
        for packet in packets:
            assert packet.pts is not None and packet.dts is not None
            packet.pts -= origin
            packet.dts -= origin
            packet.stream = copy
            out.mux(packet)
    return path


def write_text(path: Path) -> Path:
    """Write prose under a video's name."""
    path.write_text("This is no video.\n" * 50, "utf-8")
    return path


def write_flipped(path: Path, source: Path, *, flips: int, seed: int) -> Path:
    """Copy `source` with `flips` bytes replaced at places drawn from `seed`."""
    data = bytearray(source.read_bytes())
    draws = random.Random(seed)
    for _ in range(flips):
        data[draws.randrange(len(data))] ^= draws.randrange(1, 256)
    path.write_bytes(data)
    return path


def renamed(path: Path, source: Path) -> Path:
    """Copy `source` to another name."""
    shutil.copyfile(source, path)
    return path

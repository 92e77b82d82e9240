"""Bar-coded clips of every kind that both decoders are compared on."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from precompute.video.child import Decoded, DecodeJob
from tests import media


@dataclass(frozen=True)
class Case:
    """A clip to write; `decord`: decord is exact on it; `tick`: the container's clock in microseconds."""

    file: str
    decord: bool
    tick: int = 0
    rate: int = 30
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.file


def case(file: str, decord: bool, tick: int = 0, **settings: Any) -> Case:
    return Case(file, decord, tick, int(settings.get("rate", 30)), settings)


CASES = [
    case("h264.mp4", True),
    case("h264.mov", True),
    case("h264.mkv", True, 1000),
    case("h264_open_gop.mp4", True, open_gop=True, frames=40),
    case("h264_gop_1.mp4", True, gop=1),
    case("h264_sound.mp4", True, audio_seconds=0.5),
    case("h264_fragments.mp4", True, muxer={"movflags": "frag_keyframe+empty_moov"}),
    case("h264_odd.mp4", True, pixels="yuv444p", height=47, width=81),
    case("h264_422.mp4", True, pixels="yuv422p"),
    case("h264_full_range.mp4", True, pixels="yuvj420p"),
    case("h264_bt709.mp4", True, options={"colorspace": "bt709"}),
    case("hevc_default.mp4", True, codec="libx265", frames=60, options={"x265-params": ""}),
    case("hevc_open_gop.mp4", True, codec="libx265", frames=40, bframes=4, open_gop=True),
    case("mpeg4.mp4", True, codec="mpeg4"),
    case("mpeg4.avi", True, codec="mpeg4", bframes=0),
    case("mpeg4_bframes.avi", False, codec="mpeg4"),
    case("h264.avi", False),
    case("h264.flv", False, 1000),
    case("h264.ts", False),
    case("h264_10_bit.mp4", False, pixels="yuv420p10le"),
    case("h264_interlaced.mp4", False, options={"flags": "+ildct+ilme"}),
    case("hevc_10_bit.mp4", False, codec="libx265", pixels="yuv420p10le"),
    case("mpeg2.ts", False, codec="mpeg2video"),
    case("mpeg2.mpg", False, codec="mpeg2video"),
    case("vp9.webm", False, 1000, codec="libvpx-vp9"),
    case("vp9_odd.webm", False, 1000, codec="libvpx-vp9", height=47, width=81),
    case("vp8.webm", False, 1000, codec="libvpx"),
    case("av1.mp4", False, codec="libsvtav1", height=64, width=160),
    case("ffv1.mkv", False, 1000, codec="ffv1"),
    case("ten_a_second.gif", False, codec="gif", pixels="rgb8", rate=10),
    case("one_frame.mp4", True, frames=1),
    case("image.png", False, codec="png", pixels="rgb24", frames=1, container="image2"),
    case("image.jpg", False, codec="mjpeg", pixels="yuvj420p", frames=1, container="image2"),
    case("image.webp", False, codec="libwebp", pixels="bgra", frames=1, container="webp"),
]


def clip(folder: Path, file: str, **settings: Any) -> Path:
    """Return the clip `file`, written once per folder."""
    path = folder / file
    return path if path.exists() else media.write_clip(path, **settings)


@dataclass(frozen=True)
class Sleeps(DecodeJob):
    """A job that waits before it decodes."""

    seconds: float = 1e6

    def run(self) -> Decoded:
        time.sleep(self.seconds)
        return super().run()

"""What a player shows is what is decoded: each kind of picture against FFmpeg's own filters, through PyAV."""

import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.filter import Graph
from PIL import Image

from shared.media.picture import Look, Scaled, fit
from shared.media.probe import Probed, VideoError, probe
from tests import media


def decode_all(path: Path) -> tuple[Probed, np.ndarray]:
    found = probe(path)
    return found, media.decode_probed(path, found, range(found.probe.num_frames))[0]


def filtered(path: Path, *filters: tuple[str, str]) -> np.ndarray:
    """Decode with FFmpeg's defaults, then apply its filters; uint8 [F, H, W, 3] RGB."""
    with av.open(str(path)) as source:
        frames = list(source.decode(video=0))
    graph = Graph()
    first = graph.add_buffer(template=None, width=frames[0].width, height=frames[0].height, format=frames[0].format,
                             time_base=Fraction(1, 1000))  # fmt: skip
    chain = [graph.add(name, arguments) for name, arguments in (*filters, ("format", "rgb24"))]
    graph.link_nodes(first, *chain, graph.add("buffersink")).configure()
    shown = []
    for frame in [*frames, None]:
        graph.vpush(frame)
        while True:
            try:
                shown.append(graph.vpull().to_ndarray())
            except (av.BlockingIOError, av.EOFError):
                break
    return np.stack(shown)


def largest(one: np.ndarray, other: np.ndarray) -> float:
    assert one.shape == other.shape
    return float(np.abs(one.astype(np.float32) - other.astype(np.float32)).max())


def average(one: np.ndarray, other: np.ndarray) -> float:
    assert one.shape == other.shape
    return float(np.abs(one.astype(np.float32) - other.astype(np.float32)).mean())


def write_frames(path: Path, frames: Iterator[av.VideoFrame] | list[av.VideoFrame], codec: str, **fields: Any) -> Path:
    """Encode frames as they are, 25 a second; `fields` are set on the codec."""
    frames = list(frames)
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream(codec, rate=25, options=fields.pop("options", {}))
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, frames[0].format.name
        for name, value in fields.items():
            setattr(stream.codec_context, name, value)
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base = number, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def flat(code: float, **colors: int) -> av.VideoFrame:
    """Return a gray frame of a code from 0 to 1, limited range of 10 bits."""
    frame = av.VideoFrame(96, 64, "yuv420p10le")
    for number, value in enumerate((round(64 + 876 * code), 512, 512)):
        plane = frame.planes[number]
        plane.update(np.full((plane.height, plane.line_size // 2), value, "<u2").tobytes())
    for name, value in colors.items():
        setattr(frame, name, value)
    return frame


def colorful(pixels: str, height: int = 48, width: int = 80, **colors: int) -> av.VideoFrame:
    """Return a smooth frame of many colors in a pixel format."""
    down, right = np.mgrid[:height, :width] / max(height, width)
    picture = np.stack([right * 255, down * 400, 255 - right * 200], -1).clip(0, 255).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
    for name, value in colors.items():
        setattr(frame, name, value)
    return frame


@pytest.mark.parametrize(
    ("file", "aspect", "width"),
    [
        ("a.mp4", Fraction(4, 3), 107),
        ("a.avi", Fraction(1, 2), 40),
        ("a.mpg", Fraction(4, 5), 64),  # MPEG-2 stores one of four display ratios
    ],
)
def test_pictures_have_square_pixels(file: str, aspect: Fraction, width: int, tmp_path: Path) -> None:
    codec = {"a.mpg": "mpeg2video", "a.avi": "mpeg4"}.get(file, "libx264")
    path = write_frames(tmp_path / file, [colorful("yuv420p")] * 30, codec, sample_aspect_ratio=aspect)
    found, frames = decode_all(path)
    assert (found.probe.height, found.probe.width) == (48, width) == frames.shape[1:3]
    expected = filtered(path, ("format", "rgb24"), ("scale", f"{width}:48:flags=bicubic"))
    # FFmpeg's bicubic has another parameter, and its result is clamped.
    assert largest(frames.clip(0, 255), expected) < 8 and average(frames.clip(0, 255), expected) < 0.6


def test_a_turned_picture_has_square_pixels_too() -> None:
    look = Look((48, 80), aspect=(2, 1), rotation=90)
    assert (look.pixels, look.size) == ((80, 48), (160, 48))
    assert Look((48, 80), aspect=(1, 2), rotation=0, crop=(0, 8, 10, 0)).size == (40, 35)


def test_a_change_of_the_pixel_aspect_in_the_stream_is_noticed(tmp_path: Path) -> None:
    parts = []
    for name, aspect in (("a", Fraction(1)), ("b", Fraction(4, 3))):
        frames = [colorful("yuv420p")] * 8
        parts.append(write_frames(tmp_path / f"{name}.h264", frames, "libx264", sample_aspect_ratio=aspect))
    path = tmp_path / "joined.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    found = probe(path)
    assert (found.probe.num_frames, found.probe.width) == (16, 80)
    media.decode_probed(path, found, range(4))
    with pytest.raises(VideoError, match="the frame size changes: at frame"):
        media.decode_probed(path, found, [12])


def with_clap(data: bytes, box: bytes) -> bytes:
    """Insert a box at the end of the sample entry avc1 (ISO 14496-12, 12.1.4) and enlarge the boxes around it."""
    changed = bytearray(data)
    place = 0
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"):
        place = data.index(name, place + 8) - 4
        (size,) = struct.unpack(">I", data[place : place + 4])
        changed[place : place + 4] = struct.pack(">I", size + len(box))
        end = place + size
    return bytes(changed[:end]) + box + bytes(changed[end:])


def test_the_clean_aperture_of_mp4_is_what_is_shown(folder: Path, tmp_path: Path) -> None:
    source = media.clip(folder, "plain_5.mp4", frames=5)  # its index lies behind the pictures
    # 60 x 40 of 80 x 48 pixels, its centre 2 pixels right and 1 down
    box = struct.pack(">I4s8I", 40, b"clap", 60, 1, 40, 1, 2, 1, 1, 1)
    path = tmp_path / "clap.mp4"
    path.write_bytes(with_clap(source.read_bytes(), box))
    found, frames = decode_all(path)
    assert (found.probe.height, found.probe.width) == (40, 60)
    assert np.array_equal(frames, decode_all(source)[1][:, 5:45, 12:72])


def test_the_crop_of_matroska_is_what_is_shown(tmp_path: Path) -> None:
    source = write_frames(tmp_path / "a.mkv", [colorful("yuv420p")] * 3, "libx264", sample_aspect_ratio=Fraction(2))
    data = source.read_bytes()
    # DisplayUnit "unknown" becomes PixelCropTop (RFC 9559, 5.1.4.1.28.13), with square pixels by default.
    assert data.count(b"\x54\xb2\x81\x04") == 1, "the muxer writes another header"
    path = tmp_path / "cropped.mkv"
    path.write_bytes(data.replace(b"\x54\xb2\x81\x04", b"\x54\xbb\x81\x08"))
    found, frames = decode_all(path)
    assert (found.probe.look.crop, found.probe.width) == ((8, 0, 0, 0), 80)
    assert np.array_equal(frames, filtered(path, ("null", ""))[:, 8:])


@pytest.mark.parametrize("top_first", [True, False])
def test_interlaced_pictures_are_deinterlaced_like_bwdif(top_first: bool, tmp_path: Path) -> None:
    rows = np.arange(64)[:, None]
    pictures = []
    for number in range(8):  # a bar that moves from field to field
        fields = [
            np.where(abs(np.arange(96)[None] - 10 - 6 * time) < 8, 220, 30) + 0 * rows
            for time in (2 * number, 2 * number + 1)
        ]
        woven = np.where((rows % 2 == 0) == top_first, *fields).astype(np.uint8)
        pictures.append(av.VideoFrame.from_ndarray(np.repeat(woven[..., None], 3, -1), format="rgb24"))
    frames = [picture.reformat(format="yuv420p") for picture in pictures]
    order = "tff" if top_first else "bff"
    options = {"x264-params": f"{order}=1:bframes=2:keyint=4:scenecut=0", "crf": "5", "preset": "ultrafast"}
    path = write_frames(tmp_path / "a.mp4", frames, "libx264", options=options)
    found, shown = decode_all(path)
    assert found.probe.look.interlaced and found.probe.num_frames == 8
    expected = filtered(path, ("bwdif", "mode=send_frame:deint=interlaced"))
    assert np.array_equal(shown, expected)
    assert not np.array_equal(shown, filtered(path, ("null", "")))
    for first in range(1, 8):
        assert np.array_equal(media.decode_probed(path, found, [first])[0][0], expected[first]), first


@pytest.mark.parametrize(("curve", "white", "gray"), [("smpte2084", 0.5806, 0.4), ("arib-std-b67", 0.75, 0.4)])
def test_hdr_becomes_sdr_with_a_white_page(curve: str, white: float, gray: float, tmp_path: Path) -> None:
    transfer = {"smpte2084": 16, "arib-std-b67": 18}[curve]
    parameters = f"colorprim=bt2020:colormatrix=bt2020nc:transfer={curve}:range=tv:log-level=error"
    colors = {"colorspace": 9, "color_range": 1, "color_trc": transfer, "color_primaries": 9}
    levels = []
    for code in (0.0, 0.2, gray, white, 1.0):
        frames = [flat(code, **colors)] * 2
        path = write_frames(tmp_path / "a.mp4", frames, "libx264", options={"x264-params": parameters})
        _, shown = decode_all(path)
        assert np.ptp(shown[0, 20, 20]) < 1.5, "gray stays gray"
        levels.append(float(shown[0].mean()))
    assert levels == sorted(levels) and levels[0] < 1 and levels[-1] > 254
    assert abs(levels[3] - 232) < 3, "BT.2390's spline at reference white, through a gamma of 2.4"
    assert 60 < levels[2] < 160


def test_wide_sdr_colors_become_those_of_bt709() -> None:
    look = Look((1, 2), colors=(2, 9))
    codes = (np.array([[[0.5, 0.5, 0.5], [0.6, 0.3, 0.2]]]) * 65535).astype(np.uint16)
    (gray, red) = fit(codes, look, Scaled((1, 2), (0, 0, 1, 2)))[0]
    assert np.abs(gray - 127.5).max() < 0.5
    # BT.2087: linear light by the matrix from BT.2020 to BT.709
    light = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]) @ (
        np.array([0.6, 0.3, 0.2]) ** 2.4
    )
    assert np.abs(red - 255 * light.clip(0) ** (1 / 2.4)).max() < 0.5


@pytest.mark.parametrize(("matrix", "span"), [("bt709", "tv"), ("smpte170m", "pc"), ("bt2020nc", "tv")])
def test_color_matrix_and_range_are_those_of_the_file(matrix: str, span: str, tmp_path: Path) -> None:
    source, pixels = colorful("rgb24"), "yuvj444p" if span == "pc" else "yuv444p"
    graph = Graph()
    first = graph.add_buffer(width=80, height=48, format=source.format, time_base=Fraction(1, 25))
    scale = graph.add("scale", f"out_color_matrix={matrix}:out_range={span}")
    graph.link_nodes(first, scale, graph.add("format", pixels), graph.add("buffersink")).configure()
    source.pts = 0
    graph.vpush(source)
    options = {"x264-params": f"colormatrix={matrix}:range={span}:log-level=error", "qp": "0"}
    path = write_frames(tmp_path / "a.mp4", [graph.vpull()], "libx264", options=options)
    _, (shown,) = decode_all(path)
    assert largest(shown, source.to_ndarray()) <= 4


def test_an_untagged_picture_has_bt709_above_576_lines(tmp_path: Path) -> None:
    for height, matrix in ((576, "smpte170m"), (720, "bt709")):
        frame = colorful("yuv420p", height, 960)
        frame.colorspace = 2
        path = write_frames(tmp_path / f"{height}.mp4", [frame], "libx264", options={"preset": "ultrafast"})
        found, (shown,) = decode_all(path)
        expected = filtered(path, ("scale", f"in_color_matrix={matrix}:in_range=tv:out_range=pc"))[0]
        assert average(shown, expected) < 0.7
        assert found.probe.look.plain is (height == 576)


@pytest.mark.parametrize("pixels", ["yuv422p", "yuv420p10le", "gray10le", "bgr0"])
def test_pixel_formats_give_the_same_colors(pixels: str, tmp_path: Path) -> None:
    path = write_frames(tmp_path / "a.mkv", [colorful(pixels)] * 2, "ffv1")
    assert largest(decode_all(path)[1], filtered(path, ("null", ""))) <= 3


def alpha_picture() -> np.ndarray:
    """Return [48, 80, 4] RGBA: bright colors whose alpha falls from 255 to 0."""
    picture = colorful("rgba").to_ndarray()
    picture[..., 3] = np.linspace(255, 0, 80).astype(np.uint8)[None]
    return picture


@pytest.mark.parametrize("file", ["a.png", "b.png", "d.webp", "f.mov", "g.webm"])
def test_transparent_pictures_stand_on_black(file: str, tmp_path: Path) -> None:
    path, rgba = tmp_path / file, alpha_picture()
    image = Image.fromarray(rgba)
    more: dict[str, Any] = {
        "save_all": True,
        "append_images": [Image.fromarray(rgba[::-1].copy())],
        "duration": [80, 400],
    }
    codecs = {"f.mov": ("prores_ks", "yuva444p10le"), "g.webm": ("libvpx-vp9", "yuva420p")}
    if file in codecs:
        codec, pixels = codecs[file]
        frame = av.VideoFrame.from_ndarray(rgba, format="rgba").reformat(format=pixels)
        write_frames(path, [frame] * 2, codec, options={"crf": "4"} if codec == "libvpx-vp9" else {})
    else:
        image.save(path, lossless=True, **(more if file in ("b.png", "d.webp") else {}))
    found, frames = decode_all(path)
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    black.alpha_composite(image)
    expected = np.asarray(black.convert("RGB"))
    assert average(frames[0], expected) < (1 if path.suffix != ".webm" else 4)
    assert frames[0][:, -1].max() < 12, "a transparent pixel has no color"
    if file in ("b.png", "d.webp"):
        assert (found.timestamps_us.tolist(), found.probe.end_us) == ([0, 80_000], 480_000)


@pytest.mark.parametrize(
    ("file", "codec"),
    [
        ("a.ogv", "libvpx"),
        ("a.mxf", "mpeg2video"),
        ("a.hevc", "libx265"),
        ("a.wmv", "wmv2"),
        ("a.3gp", "libx264"),
        ("a.ivf", "libvpx-vp9"),
    ],
)
def test_containers_that_players_know_are_read(file: str, codec: str, tmp_path: Path) -> None:
    path = media.write_clip(tmp_path / file, codec=codec, frames=12, rate=25, height=64, width=96, bframes=0)
    found, frames = decode_all(path)
    assert media.indices_of(frames) == list(range(found.probe.num_frames))
    assert found.timestamps_us[1] == 40_000 and found.probe.start_us == 0
    assert found.probe.end_us in (0, found.timestamps_us[-1] + 40_000), "known, or one interval"


def test_another_container_is_named_with_the_command_that_converts(tmp_path: Path) -> None:
    path = media.write_clip(tmp_path / "a.swf", codec="flv1", frames=5)
    with pytest.raises(VideoError, match=r"convert it: ffmpeg -i VIDEO NEW\.mp4"):
        probe(path)


def test_a_video_that_starts_later_than_its_sound_counts_from_the_sound(tmp_path: Path) -> None:
    path = tmp_path / "late.mkv"
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 80, 48, "yuv420p"
        sound: Any = out.add_stream("aac", rate=16000)
        packets = []
        for number in range(25):
            frame = av.VideoFrame.from_ndarray(media.draw(number, 48, 80), format="rgb24")
            frame.pts, frame.time_base = 50 + number, Fraction(1, 25)
            packets += stream.encode(frame)
        media.write_sound(out, sound, 3)
        out.mux(packets + stream.encode(None))
    found = probe(path).probe
    assert abs(found.start_us - 2_000_000) < 70_000
    assert found.end_us == 1_000_000


def test_a_path_that_leads_through_a_link_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    path = media.write_clip(tmp_path / "inside/a.mp4", frames=2)
    (tmp_path / "link").symlink_to(tmp_path / "inside")
    (tmp_path / "b.mp4").symlink_to(path)
    assert probe(path).probe.num_frames == 2
    for through in (tmp_path / "link/a.mp4", tmp_path / "b.mp4"):
        with pytest.raises(VideoError, match="a link was put into its path") as error:
            probe(through)
        assert not error.value.permanent

"""One decoded frame -> RGB as a player shows it: cropped, deinterlaced, upright, over black, in BT.709 colors.

HDR becomes SDR by Report ITU-R BT.2390, 5.4.1: a peak of 1,000 cd/m2 is mapped to 203 cd/m2 (reference white, BT.2408)
on the largest of R, G and B, and shown on a display of BT.1886. Reference white becomes 232 of 255.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

Pixels = npt.NDArray[Any]
"""[H, W, 3] RGB: uint8, or float32 from about 0 to 255 where the picture was scaled or its colors converted."""

QUARTER_TURNS: dict[tuple[int, ...], tuple[int, bool]] = {
    (1, 0, 0, 1): (0, False),
    (0, -1, 1, 0): (90, False),
    (-1, 0, 0, -1): (180, False),
    (0, 1, -1, 0): (270, False),
    (-1, 0, 0, 1): (0, True),
    (0, 1, 1, 0): (90, True),
    (1, 0, 0, -1): (180, True),
    (0, -1, -1, 0): (270, True),
}
"""Signs of a display matrix (a, b, c, d) -> degrees counter-clockwise, after mirroring left and right."""
EXIF_TURNS = ((0, False), (0, True), (180, False), (180, True), (90, True), (270, False), (270, True), (90, False))
"""The same for the EXIF orientations 1 to 8 (CIPA DC-008, 4.6.6)."""

# Codes of Rec. ITU-T H.273, which are FFmpeg's.
RGB, BT709, UNSPECIFIED, BT2020 = 0, 1, 2, 9
MATRICES = (RGB, BT709, UNSPECIFIED, 4, 5, 6, 7, BT2020, 10)
PQ, HLG = 16, 18
OTHER_CURVES = (8, 9, 10, 17)
"""Linear, logarithmic and cinema curves."""
SD_HEIGHT = 576
"""Players take BT.601 for an untagged picture of at most this height, else BT.709 (FFmpeg's ffplay)."""
TO_BT709 = {
    9: ((1.660491, -0.587641, -0.072850), (-0.124550, 1.132900, -0.008349), (-0.018151, -0.100579, 1.118730)),
    12: ((1.224940, -0.224940, 0.0), (-0.042057, 1.042057, 0.0), (-0.019638, -0.078636, 1.098274)),
}
"""Linear RGB of the primaries BT.2020 and Display P3 -> BT.709 (BT.2087)."""
HDR_PEAK, WHITE, GAMMA = 1000.0, 203.0, 2.4
FILTER_BLOCK = 8
"""Outputs of a resize's filter that are made by one product: few enough that most of its weights are not zero."""


class NotShown(Exception):
    """A picture that cannot be shown exactly; the message is one short line."""


@dataclass(frozen=True, slots=True)
class Look:
    """The way a frame is shown."""

    stored: tuple[int, int]
    """Height and width of the decoded frame."""
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Top, bottom, left and right of the stored frame that the container hides."""
    aspect: tuple[int, int] = (1, 1)
    """Width to height of one pixel."""
    rotation: int = 0
    """0, 90, 180 or 270 degrees counter-clockwise from stored to displayed."""
    mirrored: bool = False
    """True if left and right are exchanged before the rotation."""
    pixel_format: str = ""
    colors: tuple[int, int] = (UNSPECIFIED, UNSPECIFIED)
    """Transfer curve and primaries that must be converted; unspecified where the codes are shown as they are."""
    interlaced: bool = False

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width in pixels after crop and rotation, before scaling."""
        top, bottom, left, right = self.crop
        size = self.stored[0] - top - bottom, self.stored[1] - left - right
        return size if self.rotation % 180 == 0 else (size[1], size[0])

    @property
    def size(self) -> tuple[int, int]:
        """Displayed height and width in square pixels: the stored width is scaled by `aspect`."""
        height, width = self.pixels
        wide, tall = self.aspect
        if wide == tall:
            return height, width
        if self.rotation % 180:
            return max(1, round(Fraction(height * wide, tall))), width
        return height, max(1, round(Fraction(width * wide, tall)))

    @property
    def converts(self) -> bool:
        """True if the colors must be converted."""
        return self.colors != (UNSPECIFIED, UNSPECIFIED)

    @property
    def plain(self) -> bool:
        """True if the stored pixels are the shown ones, but for their color model."""
        whole = self.pixels == self.size == self.stored and not (self.rotation or self.mirrored or self.interlaced)
        return whole and not self.converts and (self.stored[0] <= SD_HEIGHT)


@dataclass(frozen=True, slots=True)
class Scaled:
    """The height and width that pictures are scaled to, and the part of them that is kept."""

    size: tuple[int, int]
    part: tuple[int, int, int, int]
    """Top, left, height and width in the scaled picture."""


def look_of(
    frame: "VideoFrame", aspect: Fraction | None, crop: tuple[int, int, int, int], turn: tuple[int, bool]
) -> Look:
    """Return how a frame is shown; raise `NotShown` where that is not possible."""
    rotation, mirrored = turn
    transfer, primaries = int(frame.color_trc), int(frame.color_primaries)
    if transfer in OTHER_CURVES or int(frame.colorspace) not in MATRICES:
        raise NotShown(
            "its colors are neither SDR, PQ nor HLG: convert it: ffmpeg -i VIDEO -vf zscale=t=709:m=709 NEW.mp4"
        )
    aspect = aspect or Fraction(1)
    look = Look(
        stored=(frame.height, frame.width),
        crop=crop,
        aspect=(aspect.numerator, aspect.denominator),
        rotation=rotation,
        mirrored=mirrored,
        pixel_format=frame.format.name,
        colors=(
            transfer if transfer in (PQ, HLG) else UNSPECIFIED,
            BT2020 if transfer in (PQ, HLG) else primaries if primaries in TO_BT709 else UNSPECIFIED,
        ),
        interlaced=frame.interlaced_frame,
    )
    if min(look.pixels) <= 0:
        raise NotShown("its crop leaves no pixels")
    return look


def turn_of(frame: "VideoFrame") -> tuple[int, bool]:
    """Return the rotation and the mirroring of a frame's display matrix."""
    try:
        entries: Any = frame.side_data
    except ValueError:  # a kind that PyAV does not know, such as EXIF, which `demuxer` reads
        entries = ()
    matrix = next((entry for entry in entries if entry.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        if frame.rotation % 90:
            raise NotShown("its display matrix is not a rotation by quarter turns")
        return frame.rotation % 360, False
    entries = [int(entry) for entry in np.frombuffer(bytes(matrix), "<i4")[[0, 1, 3, 4]]]
    small = max(map(abs, entries)) // 100
    signs = tuple((entry > small) - (entry < -small) for entry in entries)
    if signs not in QUARTER_TURNS:
        raise NotShown("its display matrix is not a rotation by quarter turns")
    return QUARTER_TURNS[signs]


def deinterlaced(before: "VideoFrame | None", frame: "VideoFrame", after: "VideoFrame | None") -> "VideoFrame":
    """Return an interlaced frame as one progressive picture (FFmpeg's bwdif), made with its neighbours."""
    from av.filter import Graph

    def fits(other: "VideoFrame | None") -> bool:
        return other is not None and (other.width, other.height, other.format.name) == size

    size = frame.width, frame.height, frame.format.name
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(width=size[0], height=size[1], format=frame.format, time_base=Fraction(1, 1000))
    bwdif = graph.add("bwdif", "mode=send_frame:deint=interlaced")
    graph.link_nodes(source, bwdif, graph.add("buffersink")).configure()
    for each in (before, frame, after):
        if each is frame or fits(each):
            graph.vpush(each)
    graph.vpush(None)
    if fits(before):
        graph.vpull()
    return graph.vpull()


def rgb_picture(frame: "VideoFrame", look: Look) -> Pixels:
    """Convert a frame to [H, W, 3] RGB of `look.pixels`: uint8, or uint16 where the colors are to be converted."""
    if frame.colorspace == UNSPECIFIED and look.stored[0] > SD_HEIGHT and not frame.format.is_rgb:
        frame.colorspace = BT2020 if look.converts else BT709
    has_alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    formats = ("rgba64le", "rgb48le") if look.converts else ("rgba", "rgb24")
    # One thread: a converter that is not collected yet keeps its threads, and their stacks count as memory.
    picture: Pixels = frame.reformat(format=formats[not has_alpha], threads=1).to_ndarray()
    if has_alpha:  # straight alpha, over black
        full = int(np.iinfo(picture.dtype).max)
        alpha = picture[..., 3:].astype(np.uint32)
        picture = ((picture[..., :3] * alpha + full // 2) // full).astype(picture.dtype)
    top, bottom, left, right = look.crop
    picture = picture[top : picture.shape[0] - bottom, left : picture.shape[1] - right]
    if look.mirrored:
        picture = picture[:, ::-1]
    return np.rot90(picture, look.rotation // 90)


def fit(picture: Pixels, look: Look, scaled: Scaled) -> Pixels:
    """Scale a picture, keep its part and convert its colors; pixels that need neither stay uint8.

    Antialiased bicubic, as `torch.nn.functional.interpolate(mode="bicubic", antialias=True)`; the overshoot stays.
    """
    top, left, height, width = scaled.part
    if picture.shape[:2] != scaled.size:
        picture = _resized(picture, scaled)
    else:
        picture = picture[top : top + height, left : left + width]
    return _bt709(picture.astype(np.float32) / 65535, *look.colors) if look.converts else picture


def _resized(picture: Pixels, scaled: Scaled) -> Pixels:
    """Return the kept part of the scaled picture in float32, made by products with blocks of the two filters."""
    top, left, height, width = scaled.part
    channels = picture.shape[2]
    down = _filter_blocks(picture.shape[0], scaled.size[0], top, height, 1)
    across = _filter_blocks(picture.shape[1], scaled.size[1], left, width, channels)
    first, stop = across[0][1].start, across[-1][1].stop
    picture = picture[:, first // channels : stop // channels]
    rows = np.empty((height, stop - first), np.float32)
    for place, source, weights in down:
        block = np.ascontiguousarray(picture[source], np.float32)
        np.matmul(weights, block.reshape(len(block), -1), out=rows[place])
    columns = np.empty((height, width * channels), np.float32)
    for place, source, weights in across:
        np.matmul(rows[:, source.start - first : source.stop - first], weights.T, out=columns[:, place])
    return columns.reshape(height, width, channels)


@lru_cache(16)
def _filter_blocks(num_in: int, num_out: int, start: int, count: int, channels: int) -> list[tuple[slice, slice, Any]]:
    """Return the filter from `num_in` to the outputs `start` to `start + count` of `num_out` pixels, in blocks.

    A block is the place of its outputs, that of its inputs, and weights [outputs, inputs]; channels are interleaved.
    The filter is Keys' cubic convolution with a = -0.5, as wide as `num_in / num_out` where that is above 1.
    """
    scale, blocks = num_in / num_out, []
    wide = max(scale, 1.0)
    for begin in range(0, count, FILTER_BLOCK):
        end = min(begin + FILTER_BLOCK, count)
        centers = (start + np.arange(begin, end) + 0.5) * scale
        first, stop = max(0, int(centers[0] - 2 * wide + 0.5)), min(num_in, int(centers[-1] + 2 * wide + 0.5))
        x = np.abs(np.arange(first, stop) + 0.5 - centers[:, None]) / wide
        weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((2.5 - 0.5 * x) * x - 4) * x + 2, 0))
        weights = np.kron(weights / weights.sum(1, keepdims=True), np.eye(channels)).astype(np.float32)
        place, source = slice(begin * channels, end * channels), slice(first * channels, stop * channels)
        blocks.append((place, source, weights))
    return blocks


def _bt709(codes: Pixels, transfer: int, primaries: int) -> Pixels:
    """Convert R'G'B' codes from 0 to 1 to SDR codes of BT.709, 0 to 255; `transfer` is PQ, HLG or a display's gamma."""
    codes = codes.clip(0, 1)
    if transfer == PQ:
        light = _tone_mapped(_pq_to_light(codes)) / WHITE
    elif transfer == HLG:  # BT.2100, table 5: inverse OETF, then the OOTF of a display of 1,000 cd/m2
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        scene = np.where(codes <= 0.5, codes**2 / 3, (np.exp((codes - c) / a) + b) / 12)
        luminance = scene @ np.array((0.2627, 0.6780, 0.0593), np.float32)
        light = _tone_mapped(HDR_PEAK * scene * luminance[..., None] ** 0.2) / WHITE
    else:
        light = codes**GAMMA
    light = light @ np.array(TO_BT709[primaries], np.float32).T
    sdr: Pixels = (255 * light.clip(0, 1) ** (1 / GAMMA)).astype(np.float32)
    return sdr


def _tone_mapped(light: Pixels) -> Pixels:
    """Compress light (cd/m2) to `WHITE` by the EETF of BT.2390, 5.4.1, black staying black."""
    peak, largest = float(_light_to_pq(HDR_PEAK)), float(_light_to_pq(WHITE) / _light_to_pq(HDR_PEAK))
    brightest = light.max(axis=-1, keepdims=True)
    code = (_light_to_pq(brightest) / peak).clip(0, 1)
    knee = 1.5 * largest - 0.5
    t = ((code - knee) / (1 - knee)).clip(0, 1)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * largest
    mapped = _pq_to_light(np.where(code < knee, code, spline) * peak)
    compressed: Pixels = light * (mapped / np.maximum(brightest, 1e-6))
    return compressed


def _pq_to_light(code: Pixels) -> Pixels:
    """Return cd/m2 (SMPTE ST 2084)."""
    root = code ** (1 / 78.84375)
    light: Pixels = 10_000 * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)
    return light


def _light_to_pq(light: Any) -> Any:
    """Return the code from 0 to 1 of cd/m2 (SMPTE ST 2084)."""
    root = (light / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * root) / (1 + 18.6875 * root)) ** 78.84375

"""Decoded frames -> VAE input: resized, cropped, mirrored and normalized on the encode device."""

from typing import Literal

import torch
import torch.nn.functional as F

from shared import seeding
from shared.model.geometry import Bucket

TRANSFORM = "bicubic-antialias-1"
"""Names this file's arithmetic in the recipe; a change of the arithmetic needs another name."""

Mode = Literal["center", "random", "letterbox"]


def to_clip(frames: torch.Tensor, bucket: Bucket, *, mode: Mode, flip: bool, crop_seed: str) -> torch.Tensor:
    """Resize, crop and normalize uint8 [F,H,W,3] to float32 [3,F,H,W] of the bucket's size, in about [-1, 1].

    An antialiased bicubic resize makes the frame cover the bucket (fit into it for letterbox). Its overshoot is not
    clamped, as in the reference script. `crop_seed` places a random crop.
    """
    pixels = frames.permute(0, 3, 1, 2).float()
    height, width = scaled_size(pixels.shape[2], pixels.shape[3], bucket, mode)
    if (height, width) != tuple(pixels.shape[2:]):
        pixels = F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    pixels = (pixels - 127.5) / 127.5
    if mode == "letterbox":
        top, left = (bucket.height - height) // 2, (bucket.width - width) // 2
        margins = (left, bucket.width - width - left, top, bucket.height - height - top)
        pixels = F.pad(pixels, margins, value=-1.0)
    else:
        top, left = crop_offset(height, width, bucket, mode, crop_seed)
        pixels = pixels[:, :, top : top + bucket.height, left : left + bucket.width]
    if flip:
        pixels = pixels.flip(3)
    return pixels.permute(1, 0, 2, 3)


def scaled_size(height: int, width: int, bucket: Bucket, mode: Mode) -> tuple[int, int]:
    """Return the size that keeps the aspect ratio and covers the bucket (fits into it for letterbox)."""
    covers_by_height = bucket.height * width >= bucket.width * height
    if covers_by_height == (mode != "letterbox"):
        return bucket.height, _nearest(width * bucket.height, height)
    return _nearest(height * bucket.width, width), bucket.width


def crop_offset(height: int, width: int, bucket: Bucket, mode: Mode, seed: str) -> tuple[int, int]:
    """Return top and left of the crop."""
    top_room, left_room = height - bucket.height, width - bucket.width
    if mode == "random":
        draw = seeding.generator("crop", seed)
        return int(draw.integers(top_room + 1)), int(draw.integers(left_room + 1))
    return top_room // 2, left_room // 2


def _nearest(numerator: int, denominator: int) -> int:
    """Divide, rounded to the nearest integer and at least 1."""
    return max(1, (2 * numerator + denominator) // (2 * denominator))

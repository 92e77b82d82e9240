"""Decoded frames -> VAE input: the place in the bucket, and pixels normalized, mirrored and padded."""

from typing import Literal

import torch
import torch.nn.functional as F

from shared import seeding
from shared.media.picture import Scaled
from shared.model.geometry import SPATIAL_FACTOR, TEMPORAL_FACTOR, Bucket

TRANSFORM = "bicubic-antialias-3"
"""Names the arithmetic of this file and of `picture` in the recipe; a change of the arithmetic needs another name."""

Mode = Literal["center", "random", "letterbox"]


def scaled_into(height: int, width: int, bucket: Bucket, mode: Mode, crop_seed: str) -> Scaled:
    """Return how pictures of a displayed size are scaled to cover the bucket (fit into it for letterbox) and cropped.

    `crop_seed` places a random crop.
    """
    size = scaled_size(height, width, bucket, mode)
    if mode == "letterbox":
        return Scaled(size, (0, 0, *size))
    return Scaled(size, (*crop_offset(*size, bucket, mode, crop_seed), bucket.height, bucket.width))


def to_clip(frames: torch.Tensor, bucket: Bucket, *, flip: bool) -> torch.Tensor:
    """Normalize scaled and cropped RGB [F,H,W,3] to float32 [3,F,H,W] of the bucket's size, in about [-1, 1].

    The overshoot of the resize is not clamped, as in the reference script. Margins become black. Float32 frames are
    overwritten: they are as large as the result.
    """
    pixels = frames.permute(0, 3, 1, 2).float().sub_(127.5).div_(127.5)
    height, width = pixels.shape[2:]
    if (height, width) != (bucket.height, bucket.width):
        top, left = (bucket.height - height) // 2, (bucket.width - width) // 2
        pixels = F.pad(pixels, (left, bucket.width - width - left, top, bucket.height - height - top), value=-1.0)
    if flip:
        pixels = pixels.flip(3)
    return pixels.permute(1, 0, 2, 3)


def thumbnails(clip: torch.Tensor) -> torch.Tensor:
    """Average a clip [3,F,H,W] of about [-1, 1] over the pixels of each latent pixel: uint8 [F',3,H/8,W/8].

    Frames are halved twice as in diffusers' `CogVideoXDownsample3D`: of an odd count the first stays alone.
    """
    frames = F.avg_pool2d(clip.transpose(0, 1), SPATIAL_FACTOR)
    for _ in range(TEMPORAL_FACTOR // 2):
        alone = len(frames) % 2
        pairs = frames[alone:].reshape(len(frames) // 2, 2, *frames.shape[1:]).mean(1)
        frames = torch.cat([frames[:alone], pairs])
    return frames.add(1).mul(127.5).round().clamp(0, 255).byte()


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

"""Integer shape rules of CogVideoX: pixels to latents, latents to tokens, clips to buckets.

Sources: diffusers `AutoencoderKLCogVideoX` (temporal factor 4, spatial factor 8) and `CogVideoXPatchEmbed` (patches).
"""

from collections.abc import Sequence
from dataclasses import dataclass

SPATIAL_FACTOR = 8
TEMPORAL_FACTOR = 4
ENCODE_CHUNK_FRAMES = 8
"""Pixel frames per VAE encode chunk, remainder first (diffusers `num_sample_frames_batch_size`)."""
MAX_UPSCALE = 2
"""A source that needs a larger enlargement, in either direction, is left out."""
MAX_CROPPED = 0.2
"""Part of a picture that a crop may lose unmentioned; beyond it `init` gives the aspect ratio a bucket."""


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """Frames, height and width of a clip in pixels; a shard holds one bucket."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


def latent_frames(frames: int) -> int:
    """Return the latent frames of `frames` pixel frames."""
    return (frames - 1) // TEMPORAL_FACTOR + 1


def latent_shape(bucket: Bucket, channels: int = 16) -> tuple[int, int, int, int]:
    """Return [C,F,H,W] of the bucket's latents."""
    return channels, latent_frames(bucket.frames), bucket.height // SPATIAL_FACTOR, bucket.width // SPATIAL_FACTOR


def padding_frames(num_latent_frames: int, patch_size_t: int | None) -> int:
    """Return the latent frames to add at the FRONT to fill temporal patches (diffusers' pipelines, 1.5)."""
    return -num_latent_frames % patch_size_t if patch_size_t else 0


def video_tokens(bucket: Bucket, patch_size: int, patch_size_t: int | None) -> int:
    """Return the video tokens of a clip, temporal padding included."""
    _, frames, height, width = latent_shape(bucket)
    frames = -(-frames // (patch_size_t or 1))
    return frames * (height // patch_size) * (width // patch_size)


def choose_frames(available: int, frame_buckets: Sequence[int]) -> int | None:
    """Return the largest frame bucket that `available` frames fill, or None."""
    return max((bucket for bucket in frame_buckets if bucket <= available), default=None)


def choose_resolution(height: int, width: int, buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the (height, width) bucket nearest in aspect ratio, the larger one on a tie."""
    aspect = height / width

    def distance(bucket: tuple[int, int]) -> tuple[float, int]:
        ratio = bucket[0] / bucket[1] / aspect
        return max(ratio, 1 / ratio), -bucket[0] * bucket[1]

    return min(buckets, key=distance)


def cropped_share(height: int, width: int, bucket: tuple[int, int]) -> float:
    """Return the part of a picture that is lost when it covers the bucket's (height, width)."""
    ratio = bucket[0] / bucket[1] * width / height
    return 1 - min(ratio, 1 / ratio)

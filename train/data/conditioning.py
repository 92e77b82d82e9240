"""Temporal padding of a clip's latents, and the image condition.

Frames come first, [F,C,H,W]; dtypes stay. Source: diffusers `pipelines/cogvideo/pipeline_cogvideox*.py`.
"""

import torch
from torch import Tensor

from shared.model.conventions import Conventions
from shared.model.geometry import padding_frames


def pad_front(latents: Tensor, conventions: Conventions) -> Tensor:
    """Pad [F,C,H,W] to [F',C,H,W] with copies of the first latent frame in front until `patch_size_t` divides F'.

    The pipelines add noise frames in front and cut them from the result, so training pads in front too.
    """
    added = padding_frames(latents.shape[0], conventions.patch_size_t)
    return torch.cat([latents[:1].expand(added, -1, -1, -1), latents]) if added else latents


def image_condition(image_latents: Tensor, num_frames: int, conventions: Conventions) -> Tensor:
    """Turn a draw [1,C,H,W] from the image's posterior, unscaled, into [F',C,H,W] for the channels after the latents.

    `num_frames` are latent frames, padded or not; F' is padded. The image is scaled by `image_scaling_factor` and
    fills frame 0 of the PADDED clip, with zeros in all other frames: the pipeline includes the padding in its frames
    before it builds the condition, so its branch that repeats the image in front never adds one.
    """
    assert image_latents.ndim == 4 and image_latents.shape[0] == 1, tuple(image_latents.shape)
    frames = num_frames + padding_frames(num_frames, conventions.patch_size_t)
    image = image_latents * conventions.image_scaling_factor
    return torch.cat([image, image.new_zeros(frames - 1, *image.shape[1:])])

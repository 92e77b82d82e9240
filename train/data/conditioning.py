"""What a clip's latents become before noise and transformer: temporal padding and the image condition.

Frames come first, [F,C,H,W]; dtypes stay. Source: diffusers `pipelines/cogvideo/pipeline_cogvideox*.py`.
"""

import torch
from torch import Tensor

from shared.model.conventions import Conventions
from shared.model.geometry import padding_frames


def pad_front(latents: Tensor, conventions: Conventions) -> Tensor:
    """[F,C,H,W] -> [F',C,H,W]: copies of the first latent frame in front until `patch_size_t` divides F'.

    The pipelines noise the added frames at the front and cut them from the result, so this is where training has them.
    """
    added = padding_frames(latents.shape[0], conventions.patch_size_t)
    return torch.cat([latents[:1].expand(added, -1, -1, -1), latents]) if added else latents


def image_condition(image_latents: Tensor, num_frames: int, conventions: Conventions) -> Tensor:
    """[1,C,H,W], a draw from the image's posterior, unscaled -> [F',C,H,W], to follow the noisy latents on channels.

    `num_frames` are latent frames, padded or not; F' is padded. The image is scaled by `image_scaling_factor` and
    stands in frame 0 of the PADDED clip, with zeros in all others: the pipeline counts the padding into its frames
    before it builds the condition, so its own branch that would repeat the image in front never adds one.
    """
    assert image_latents.ndim == 4 and image_latents.shape[0] == 1, tuple(image_latents.shape)
    frames = num_frames + padding_frames(num_frames, conventions.patch_size_t)
    image = image_latents * conventions.image_scaling_factor
    return torch.cat([image, image.new_zeros(frames - 1, *image.shape[1:])])

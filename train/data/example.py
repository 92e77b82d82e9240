"""One clip of one step: its records, the padding in front of its latents, and its image condition.

Frames come first, [F,C,H,W]. Source: diffusers `pipelines/cogvideo/pipeline_cogvideox*.py`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shared.model.conventions import Conventions
from shared.model.geometry import padding_frames


@dataclass(frozen=True, slots=True)
class ModelInput:
    """The transformer's input for one clip, every tensor on its device."""

    latents: Tensor
    """[F,C,H,W] noisy latents in the model's dtype, padded in front; in I2V the image condition follows on channels."""
    prompt_embeds: Tensor
    """[L,D] in the model's dtype."""
    timestep: Tensor
    """[] int64."""


@dataclass(frozen=True, slots=True)
class Example:
    """One clip of one step."""

    model_input: ModelInput
    target: Tensor
    """[F,C,H,W] velocity, fp32."""
    name: str
    """Source and start of the clip, for messages."""
    draw: str
    """Epoch, key and repetition of the clip, which seed the adapter's dropout."""
    weight: float = 1.0
    """Factor of the clip's loss."""

    def to(self, device: torch.device, dtype: torch.dtype) -> "Example":
        """Return the example on `device`, with the model's inputs in `dtype` and the target in fp32."""
        model_input = ModelInput(
            _copy_to(self.model_input.latents.to(dtype), device),
            _copy_to(self.model_input.prompt_embeds.to(dtype), device),
            _copy_to(self.model_input.timestep, device),
        )
        return replace(self, model_input=model_input, target=_copy_to(self.target, device))


def _copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a GPU through pinned memory, so that neither this thread nor the device waits."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


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

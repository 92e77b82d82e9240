"""Records of one clip of one step: the transformer's input and the training example."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


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
    """Epoch and key of the clip, which seed the adapter's dropout."""
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

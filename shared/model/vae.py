"""The VAE's decoder half: latents -> frames."""

from typing import Any

import numpy as np
import torch

from shared.config import Model
from shared.device import DTYPES
from shared.model.pretrained import pretrained_part


def load_decoder(model: Model, dtype: str, device: torch.device) -> Any:
    """Load diffusers' `AutoencoderKLCogVideoX` without its encoder; dtype "auto" is the published precision."""
    from diffusers import AutoencoderKLCogVideoX

    part = pretrained_part(model, "vae")
    vae = AutoencoderKLCogVideoX.from_pretrained(
        str(part.folder), variant=part.variant, use_safetensors=True, dtype=DTYPES[part.precision(dtype)]
    )
    vae.encoder = None
    if device.type == "cuda":
        vae.enable_tiling()
    return vae.eval().requires_grad_(False).to(device)


@torch.no_grad()
def decode_latents(vae: Any, latents: torch.Tensor) -> np.ndarray:
    """Decode scaled latents [F,C,H,W] to frames, uint8 [F',H',W',3].

    Source: `decode_latents` and `VideoProcessor` of diffusers' pipelines.
    """
    unscaled = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor
    frames = vae.decode(unscaled.transpose(0, 1)[None]).sample[0].float()
    shown = (frames / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0)
    return np.asarray(shown.mul(255).round().byte().cpu())

"""The velocity objective, in fp32 on an fp32 schedule; the transformer's door is where the model's dtype begins.

v = sqrt(abar) * noise - sqrt(1 - abar) * x0 (Salimans & Ho 2022, arXiv 2202.00512). The usual x0 loss weighted by
1 / (1 - abar) is the same number with rounding added (diffusers `train_cogvideox_lora.py`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.errors import UsageError


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """sqrt(abar) and sqrt(1 - abar) for every timestep, rooted in float64 and kept in float32."""

    signal: Tensor
    noise: Tensor

    def __len__(self) -> int:
        return len(self.signal)


def read_schedule(scheduler: Mapping[str, Any]) -> NoiseSchedule:
    """The checkpoint's own schedule, zero-terminal-SNR and SNR shift included, built by its own scheduler class."""
    import diffusers

    name = scheduler.get("_class_name", "")
    if name not in ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"):
        raise UsageError(f"scheduler_config.json: _class_name = {name!r}; expected a CogVideoX DDIM or DPM scheduler")
    config = {key: value for key, value in scheduler.items() if not key.startswith("_")}
    return schedule_from(getattr(diffusers, name)(**config).alphas_cumprod)


def schedule_from(alphas_cumprod: Tensor) -> NoiseSchedule:
    """From abar [T], whose last value may be 0."""
    abar = alphas_cumprod.double()
    return NoiseSchedule(abar.sqrt().float(), (1 - abar).sqrt().float())


def add_noise(latents: Tensor, noise: Tensor, timestep: Tensor, schedule: NoiseSchedule) -> Tensor:
    """x_t of one clip; `timestep` is an integer scalar."""
    return schedule.signal[timestep] * latents + schedule.noise[timestep] * noise


def velocity(latents: Tensor, noise: Tensor, timestep: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The target of one clip."""
    return schedule.signal[timestep] * noise - schedule.noise[timestep] * latents


def min_snr_weight(timestep: int, schedule: NoiseSchedule, gamma: float) -> float:
    """min(SNR, gamma) / (SNR + 1), the Min-SNR weight of a velocity loss (Hang et al. 2023, arXiv 2303.09556, 3.4).

    Written with SNR = abar / (1 - abar) as min(abar, gamma (1 - abar)), which is 0 where there is no signal.
    """
    return float(min(schedule.signal[timestep] ** 2, gamma * schedule.noise[timestep] ** 2))


def clip_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over one clip in fp32 (float64 if the prediction is)."""
    wide = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(wide) - target.to(wide)).square().mean()


FP16_LOSS_SCALE = 2.0**16
"""Factor of one clip's mean loss. Without it a predicted value's gradient is below fp16's smallest normal number."""


def loss_scale(dtype: torch.dtype, clips: int) -> float:
    """Return the factor of a mean over `clips` in `dtype`: a power of two, which rounds nothing; 1 but for fp16."""
    return FP16_LOSS_SCALE * 2.0 ** math.ceil(math.log2(clips)) if dtype == torch.float16 else 1.0

"""The velocity objective in fp32 on an fp32 schedule; clips are cast to the model's dtype at the transformer's input.

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
    """sqrt(abar) and sqrt(1 - abar) [T] for every timestep, computed in float64 and kept in float32."""

    signal: Tensor
    noise: Tensor

    def __len__(self) -> int:
        return len(self.signal)


def read_schedule(scheduler: Mapping[str, Any]) -> NoiseSchedule:
    """Return the checkpoint's schedule, built by its own scheduler class, with zero-terminal SNR and SNR shift.

    Raises `UsageError` if `scheduler` is not the config of a CogVideoX scheduler.
    """
    import diffusers

    name = scheduler.get("_class_name", "")
    if name not in ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"):
        raise UsageError(
            f"scheduler_config.json: expected _class_name CogVideoXDDIMScheduler or CogVideoXDPMScheduler, "
            f"got {name!r}; use a CogVideoX checkpoint"
        )
    config = {key: value for key, value in scheduler.items() if not key.startswith("_")}
    return schedule_from(getattr(diffusers, name)(**config).alphas_cumprod)


def schedule_from(alphas_cumprod: Tensor) -> NoiseSchedule:
    """Return the schedule of abar [T], whose last value may be 0."""
    abar = alphas_cumprod.double()
    return NoiseSchedule(abar.sqrt().float(), (1 - abar).sqrt().float())


def add_noise(latents: Tensor, noise: Tensor, timestep: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Return x_t of one clip; `timestep` is an integer scalar."""
    return schedule.signal[timestep] * latents + schedule.noise[timestep] * noise


def velocity(latents: Tensor, noise: Tensor, timestep: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Return the target of one clip."""
    return schedule.signal[timestep] * noise - schedule.noise[timestep] * latents


def min_snr_weight(timestep: int, schedule: NoiseSchedule, gamma: float) -> float:
    """Return min(SNR, gamma) / (SNR + 1), the Min-SNR weight of a velocity loss (arXiv 2303.09556, section 3.4).

    With SNR = abar / (1 - abar) this is min(abar, gamma (1 - abar)), which is 0 where there is no signal.
    """
    return float(min(schedule.signal[timestep] ** 2, gamma * schedule.noise[timestep] ** 2))


def clip_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error over one clip in fp32, or float64 if the prediction is."""
    wide = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(wide) - target.to(wide)).square().mean()


FP16_LOSS_SCALE = 2.0**16
"""Factor of one clip's mean loss. Without it a predicted value's gradient is below fp16's smallest normal number."""


def loss_scale(dtype: torch.dtype, clips: int) -> float:
    """Return the factor of a mean over `clips` in `dtype`: a power of two, which rounds nothing; 1 but for fp16."""
    return FP16_LOSS_SCALE * 2.0 ** math.ceil(math.log2(clips)) if dtype == torch.float16 else 1.0

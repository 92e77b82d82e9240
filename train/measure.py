"""Which conventions the frozen base model itself was trained with: its velocity loss on real clips under each.

Documentation cannot settle this (see the comment beside `invert_scale_latents` in diffusers'
`pipeline_cogvideox_image2video.py`), and a checkpoint made by another trainer may have learned another convention.
Every candidate sees the same clips, noise and timesteps, and is judged on the clip's own frames alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor

from shared import console, seeding
from shared.cache.collection import SampleReader
from shared.cache.view import ViewRow
from shared.device import choose_device
from shared.model.conventions import Conventions
from shared.model.geometry import latent_shape, padding_frames
from train.data.conditioning import image_condition
from train.data.example import ModelInput
from train.doctor import Subject
from train.evaluate import QUANTILES
from train.objective import add_noise, clip_loss, velocity
from train.transformer.forward import predict
from train.transformer.load import load_transformer

MEASURED_CLIPS = 8
NOTICEABLE = 2.0
"""Standard errors of the paired difference, below which a lower loss says nothing."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to feed the transformer."""

    conventions: Conventions
    padding_in_front: bool

    def __str__(self) -> str:
        parts = []
        if self.conventions.image_to_video:
            parts.append(f"image latents x {self.conventions.image_scaling_factor:g}")
        if self.conventions.patch_size_t:
            parts.append("padding in front" if self.padding_in_front else "padding at the end")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Measured:
    """A candidate's name -> its losses, one per clip and timestep, the same ones for all candidates."""

    configured: str
    losses: Mapping[str, tuple[float, ...]]

    @property
    def means(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in self.losses.items()}

    @property
    def warning(self) -> str | None:
        """A line if another candidate than the configured one has the lowest loss, beyond chance."""
        means = self.means
        best = min(means, key=lambda name: means[name])
        ours, theirs = (torch.tensor(self.losses[name], dtype=torch.float64) for name in (self.configured, best))
        gaps = ours - theirs
        errors = float(gaps.mean() / (gaps.std() / len(gaps) ** 0.5)) if gaps.any() else 0.0
        if errors < NOTICEABLE:
            return None
        lower = 1 - means[best] / means[self.configured]
        return (
            f"the base model's loss is {lower:.1%} lower with {best} than with {self.configured}, as its configs ask "
            f"({errors:.1f} standard errors over {len(gaps)} draws): it may have been trained that way"
        )


def measure(subject: Subject) -> Measured | None:
    """Image latents x s, x 1 and x 1/s for image-to-video, padding in front and at the end where frames are padded.

    All combinations, because one wrong convention hides another. Held-out clips are used, else clips to train on, which
    the base model has not seen either. Loads the transformer; None if there is nothing to choose.
    """
    conventions, view = subject.conventions, subject.cache.view
    rows = view.split("held_out") or view.split("train")
    padded = [row for row in rows if padding_frames(latent_shape(row.bucket)[1], conventions.patch_size_t)]
    used = (padded or rows)[:MEASURED_CLIPS]
    s = conventions.scaling_factor
    scales = (s, 1.0, 1 / s) if conventions.image_to_video else (conventions.image_scaling_factor,)
    candidates = [
        Candidate(replace(conventions, image_scaling_factor=scale), in_front)
        for scale in scales
        for in_front in ((True, False) if padded else (True,))
    ]
    if len(candidates) == 1:
        return None
    transformer = load_transformer(subject.config, choose_device(subject.config.train.device)).eval()
    transformer.disable_adapters()
    with console.Progress("clips measured", len(candidates) * len(used)) as bar:
        losses = {str(candidate): _losses(subject, transformer, candidate, used, bar) for candidate in candidates}
    return Measured(str(Candidate(conventions, True)), losses)


@torch.no_grad()
def _losses(
    subject: Subject,
    transformer: CogVideoXTransformer3DModel,
    candidate: Candidate,
    rows: Sequence[ViewRow],
    bar: console.Progress,
) -> tuple[float, ...]:
    view, storage, schedule = subject.cache.view, subject.cache.storage, subject.schedule
    latents_reader, prompts_reader = SampleReader(storage, view.latents), SampleReader(storage, view.prompts)
    losses: list[float] = []
    for row in rows:
        sample = latents_reader.read(row.latent_key)
        embeds = prompts_reader.read(row.prompt_keys[0])["prompt_embeds"]
        latents = _mean(sample["moments"]) * candidate.conventions.scaling_factor
        image = _mean(sample["image_moments"][0]) if candidate.conventions.image_to_video else None
        for quantile in QUANTILES:
            step = torch.tensor(round(quantile * (len(schedule) - 1)))
            padded, noise, own = _pad(latents, row.latent_key, int(step), candidate)
            noisy = add_noise(padded, noise, step, schedule)
            if image is not None:
                noisy = torch.cat([noisy, image_condition(image, len(latents), candidate.conventions)], dim=1)
            device, dtype = transformer.device, transformer.dtype
            clip = ModelInput(noisy.to(device, dtype), embeds.to(device, dtype), step.to(device))
            (prediction,) = predict(transformer, [clip], candidate.conventions)
            target = velocity(padded, noise, step, schedule).to(device)
            losses.append(float(clip_loss(prediction[own], target[own])))
        bar.advance()
    return tuple(losses)


def _pad(latents: Tensor, key: str, timestep: int, candidate: Candidate) -> tuple[Tensor, Tensor, slice]:
    """Padded latents [F',C,H,W], their noise, and where the clip's own frames are, whose noise no padding changes."""
    frames, *size = latents.shape
    added = padding_frames(frames, candidate.conventions.patch_size_t)
    noise = seeding.normal((frames, *size), "doctor", key, timestep)
    extra = seeding.normal((added, *size), "doctor-padding", key, timestep)
    if candidate.padding_in_front:
        padded = torch.cat([latents[:1].expand(added, -1, -1, -1), latents])
        return padded, torch.cat([extra, noise]), slice(added, None)
    padded = torch.cat([latents, latents[-1:].expand(added, -1, -1, -1)])
    return padded, torch.cat([noise, extra]), slice(0, frames)


def _mean(moments: Tensor) -> Tensor:
    """[2C,F,H,W] -> the posterior's mean [F,C,H,W] in fp32, unscaled."""
    return moments.float().chunk(2)[0].transpose(0, 1)

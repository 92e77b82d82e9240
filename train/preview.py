"""Previews: the validation prompts denoised to latents while training, from the cache alone.

T5 and the VAE are not loaded: the view's linear map shows the latents at once as an animated WebP, and `precog decode`
makes videos of them. Loop, draws and guidance are those of
diffusers' `pipelines/cogvideo/pipeline_cogvideox{,_image2video}.py`, so a preview equals `precog sample` with the
adapter of that step, the same seed and precision. An image-to-video preview begins with the first frame of a clip (a
held-out one if there is any) and has the clip's size.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import CogVideoXDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import save_file
from torch import Tensor

from shared import console
from shared.atomic_files import replacing
from shared.cache.collection import SampleReader
from shared.cache.storage import open_storage
from shared.config import Sampling, field_value, fields_shaping
from shared.errors import CacheError, UsageError
from shared.latent_rgb import latent_pictures, write_webp
from shared.model.conventions import refusal
from shared.model.geometry import TEMPORAL_FACTOR, Bucket, latent_shape, padding_frames
from shared.model.pretrained import load_scheduler
from shared.run_folder import SHEET, preview_file
from train.data.dataset import clip_label
from train.data.example import ModelInput, image_condition
from train.distributed import all_gather, broadcast, on_all_ranks, on_rank_0, rank_and_world_size
from train.run import Run
from train.transformer.forward import predict

Stopped = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class PreviewPrompt:
    """A validation prompt and the size of its preview."""

    text: str
    prompt_embeds: Tensor
    """[L,D] on the CPU."""
    negative_prompt_embeds: Tensor
    """[L,D] on the CPU."""
    bucket: Bucket
    first_frame_of: str | None
    """Label of the clip whose first frame the preview begins with; image-to-video only."""
    first_frame_moments: Tensor | None
    """[2C,1,H,W] of that frame's posterior, unscaled, on the CPU."""


def open_previews(run: Run) -> list[PreviewPrompt]:
    """Read embeddings and first frames; raises `UsageError` or `CacheError` for a preview that cannot be made."""
    config, where = run.config, f"train.preview_steps = {run.config.train.preview_steps}"
    if not config.data.validation_prompts:
        raise UsageError(f"{where}: data.validation_prompts is empty; give the prompts to preview")
    bucket = Bucket(config.sample.num_frames, config.sample.height, config.sample.width)
    if not run.conventions.image_to_video and (reason := refusal(run.conventions, bucket)):
        raise UsageError(f"{where}: sample.num_frames, height and width: {reason}")
    keys, texts = run.view.special_prompts, (*config.data.validation_prompts, config.data.negative_prompt)
    if missing := [text for text in texts if text not in keys]:
        raise CacheError(
            f"view {run.view.name}: prompt {missing[0]!r} not found; run `precog precompute` with this config"
        )
    storage = open_storage(config.precompute.cache, local_cache_gib=config.precompute.local_cache_gib)
    reader = SampleReader(storage, run.view.prompts, {keys[text] for text in texts}, whole_up_to_bytes=0)
    *embeds, negative = (reader.read(keys[text])["prompt_embeds"] for text in texts)
    prompts = []
    dataset = run.held_out if run.held_out.rows else run.dataset
    for number, (text, prompt_embeds) in enumerate(zip(config.data.validation_prompts, embeds, strict=True)):
        label, moments = None, None
        if run.conventions.image_to_video:
            row = dataset.rows[number % len(dataset.rows)]
            bucket, label = row.bucket, clip_label(row)
            moments = dataset.first_frame_moments(number % len(dataset.rows))
        prompts.append(PreviewPrompt(text, prompt_embeds, negative, bucket, label, moments))
    return prompts


def write_previews(run: Run, prompts: Sequence[PreviewPrompt], step: int, stopped: Stopped, *, again: bool) -> bool:
    """Denoise the prompts, shared out over the ranks, and write them on rank 0; a collective.

    Previews of this step that exist are kept unless `again`. False if a rank got a signal; what was denoised is kept.
    """
    folder, (rank, world_size) = run.config.train.output_dir, rank_and_world_size()
    missing = [number for number in range(len(prompts)) if again or not preview_file(folder, step, number).exists()]
    missing = broadcast(missing)

    def denoise_own(group: Sequence[int]) -> Tensor | None:
        return denoise(run, prompts[group[rank]], stopped) if rank < len(group) else None

    def write(group: Sequence[int], found: Sequence[Tensor | None]) -> None:
        for number, latents in zip(group, found, strict=False):
            if latents is not None:
                write_preview(run, prompts[number], latents, preview_file(folder, step, number), step)

    for first in range(0, len(missing), world_size):  # one per rank at a time, so that no rank waits for many
        group = missing[first : first + world_size]
        found = all_gather(on_all_ranks(partial(denoise_own, group)))
        on_rank_0(partial(write, group, found))
        if any(all_gather(stopped())):
            return False
    return True


def write_preview(run: Run, prompt: PreviewPrompt, latents: Tensor, written: Path, step: int) -> None:
    """Write latents [F,C,H,W] to the file `written` and show them."""
    about = {
        "prompt": prompt.text,
        "negative_prompt": run.config.data.negative_prompt,
        "first_frame_of": prompt.first_frame_of,
        "step": step,
        "num_frames": prompt.bucket.frames,
        "height": prompt.bucket.height,
        "width": prompt.bucket.width,
        **{name.partition(".")[2]: field_value(run.config, name) for name in fields_shaping("preview")},
    }
    written.parent.mkdir(parents=True, exist_ok=True)
    (written.parent / SHEET).unlink(missing_ok=True)
    with replacing(written.with_suffix(".json")) as path:
        path.write_text(json.dumps(about, indent=1), "utf-8")
    with replacing(written) as path:
        save_file({"latents": latents}, path)
    shown = show_preview(run, latents, written, step) if run.view.latent_rgb else written
    console.say(f"{'preview':>11} {shown}: {prompt.text}")


def show_preview(run: Run, latents: Tensor, written: Path, step: int) -> Path:
    """Write latents [F,C,H,W] as an animated WebP beside `written`, for the tracker too; return its path."""
    pictures = latent_pictures(latents / run.conventions.scaling_factor, run.view.latent_rgb)
    path = write_webp(written.with_suffix(".webp"), pictures, TEMPORAL_FACTOR / run.config.sample.fps)
    for tracker in run.accelerator.trackers:
        strip = {f"previews/{written.stem}": np.concatenate(list(pictures), axis=1)[None]}
        if tracker.name == "tensorboard":
            tracker.log_images(strip, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images(strip, step=step)
    return path


@torch.no_grad()
def denoise(run: Run, prompt: PreviewPrompt, stopped: Stopped) -> Tensor | None:
    """Return latents [F,C,H,W] of a prompt on the CPU, scaled, without padding; None if `stopped` was true.

    The conditional and the unconditional forward run one after the other, to hold activations of one clip only.
    """
    settings, transformer = run.config.sample, run.transformer
    device, dtype = run.accelerator.device, transformer.dtype
    scheduler = load_scheduler(run.config.model, settings.scheduler)
    scheduler.set_timesteps(settings.num_inference_steps, device=device)
    generator = torch.Generator().manual_seed(settings.seed)  # as `precog sample` draws it
    channels, frames, height, width = latent_shape(prompt.bucket, run.conventions.out_channels)
    padding = padding_frames(frames, run.conventions.patch_size_t)
    shape = (frames + padding, channels, height, width)
    condition = torch.zeros(shape[0], 0, height, width, device=device, dtype=dtype)  # no channels without an image
    if prompt.first_frame_moments is not None:  # the pipeline draws the image before the noise
        image = _draw(prompt.first_frame_moments, generator).transpose(0, 1)
        condition = image_condition(image.to(device, dtype), frames, run.conventions)
    latents: Tensor = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    latents = latents * scheduler.init_noise_sigma
    embeds, negative = (part.to(device, dtype) for part in (prompt.prompt_embeds, prompt.negative_prompt_embeds))

    was_training = transformer.training
    transformer.eval()
    previous, original = None, None
    try:
        with console.Progress("denoising steps", len(scheduler.timesteps)) as bar:
            for timestep in scheduler.timesteps:
                if stopped():
                    return None
                model_input = torch.cat([scheduler.scale_model_input(latents, timestep), condition], dim=1)
                guess = _velocity(run, ModelInput(model_input, embeds, timestep))
                if settings.guidance_scale > 1:
                    without = _velocity(run, ModelInput(model_input, negative, timestep))
                    guess = without + guidance(settings, int(timestep)) * (guess - without)
                if isinstance(scheduler, CogVideoXDPMScheduler):
                    latents, original = scheduler.step(
                        guess, original, timestep, previous, latents, generator=generator, return_dict=False
                    )
                else:
                    latents = scheduler.step(guess, timestep, latents, generator=generator, return_dict=False)[0]
                latents, previous = latents.to(dtype), timestep
                bar.advance()
    finally:
        transformer.train(was_training)
    return latents[padding:].cpu().contiguous()


def _velocity(run: Run, clip: ModelInput) -> Tensor:
    (prediction,) = predict(run.transformer, [clip], run.conventions, run.engine)
    return prediction.float()


def guidance(settings: Sampling, timestep: int) -> float:
    """Return the guidance scale at a timestep: the pipeline's cosine if `use_dynamic_cfg`."""
    if not settings.use_dynamic_cfg:
        return settings.guidance_scale
    steps = settings.num_inference_steps
    return 1 + settings.guidance_scale * (1 - math.cos(math.pi * ((steps - timestep) / steps) ** 5)) / 2


def _draw(moments: Tensor, generator: torch.Generator) -> Tensor:
    """Draw [C,1,H,W] from [2C,1,H,W] as the pipeline does."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    drawn: Tensor = DiagonalGaussianDistribution(moments[None]).sample(generator)[0]
    return drawn

"""Diffusers' own pipelines: text, image or video to video, with LoRAs, quantization and offloading; without T5."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, CogVideoXVideoToVideoPipeline
from torch import Tensor

from sample.memory import choose_memory, free_bytes, needed_bytes, place, quantize
from shared import console
from shared.config import Config
from shared.device import DTYPES
from shared.errors import UsageError
from shared.model.conventions import Conventions, read_conventions, refusal
from shared.model.geometry import Bucket
from shared.model.pretrained import load_scheduler, pretrained_config, pretrained_part


@dataclass(frozen=True, slots=True)
class VideoStart:
    """The start of a video beside noise and prompt."""

    image: Any = None
    """First frame, for an image-to-video checkpoint."""
    video: Any = None
    """Frames to change, for a text-to-video checkpoint."""


def checkpoint_conventions(config: Config) -> Conventions:
    """Read the checkpoint's conventions; raises `UsageError` for a size or input that it cannot make."""
    settings = config.sample
    conventions = read_conventions(
        *(pretrained_config(config.model, part) for part in ("transformer", "vae", "scheduler"))
    )
    if reason := refusal(conventions, Bucket(settings.num_frames, settings.height, settings.width)):
        raise UsageError(f"sample.num_frames, height and width: {reason}")
    if settings.video is not None and conventions.image_to_video:
        raise UsageError("sample.video: must be empty for an image-to-video checkpoint; use sample.images")
    return conventions


def uses_tiles(config: Config, device: torch.device) -> bool:
    """Return whether the VAE decodes in tiles."""
    return device.type == "cuda" if config.sample.enable_tiling == "auto" else config.sample.enable_tiling


def load_pipeline(config: Config, conventions: Conventions, device: torch.device) -> Any:
    """Load diffusers' pipeline on the CPU, without T5, in `sample.dtype`."""
    part = pretrained_part(config.model, "transformer")
    kind = CogVideoXPipeline if config.sample.video is None else CogVideoXVideoToVideoPipeline
    pipeline = (CogVideoXImageToVideoPipeline if conventions.image_to_video else kind).from_pretrained(
        config.model.pretrained_model_name_or_path,
        revision=config.model.revision,
        variant=config.model.variant,
        cache_dir=config.model.model_cache_dir,
        dtype=DTYPES[part.precision(config.sample.dtype)],
        use_safetensors=True,
        text_encoder=None,
        tokenizer=None,
        scheduler=load_scheduler(config.model, config.sample.scheduler),
    )
    if uses_tiles(config, device):
        pipeline.vae.enable_tiling()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def put_on_device(pipeline: Any, config: Config, conventions: Conventions, device: torch.device) -> str:
    """Quantize, compile and place a pipeline that has its LoRAs; print and return the memory mode."""
    settings = config.sample
    if settings.base_precision != "model":
        quantize(pipeline.transformer.transformer_blocks, settings.base_precision)
    needed = needed_bytes(pipeline, settings, conventions, uses_tiles(config, device))
    mode, reason = str(settings.memory), "as set"
    if mode == "auto":
        mode, reason = choose_memory(needed, free_bytes(device)) if device.type == "cuda" else ("none", "no GPU")
    console.say(f"memory: {mode} ({reason})")
    if settings.compile:
        for block in pipeline.transformer.transformer_blocks:
            block.compile()
    place(pipeline, mode, device)
    return mode


def make_video(
    config: Config,
    pipeline: Any,
    conventions: Conventions,
    embeds: tuple[Tensor, Tensor | None],
    seed: int,
    start: VideoStart,
    advance: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Generate one video, uint8 [F,H,W,3]; `embeds` are those of the prompt and, for guidance, of the negative one."""
    settings, device = config.sample, pipeline._execution_device
    positive, negative = (None if part is None else part.to(device, pipeline.transformer.dtype) for part in embeds)
    inputs: dict[str, Any] = {"num_frames": settings.num_frames}
    if conventions.image_to_video:
        inputs["image"] = start.image
    elif start.video is not None:
        inputs = {"video": start.video, "strength": settings.strength}

    def count_step(*_: Any) -> dict[str, Any]:
        advance()
        return {}

    frames = pipeline(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        height=settings.height,
        width=settings.width,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        use_dynamic_cfg=settings.use_dynamic_cfg,
        max_sequence_length=conventions.text_length,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=count_step,
        output_type="np",
        **inputs,
    ).frames[0]
    return (np.asarray(frames) * 255).round().astype(np.uint8)


def num_steps(config: Config) -> int:
    """Return the denoising steps of one video."""
    steps = config.sample.num_inference_steps
    return steps if config.sample.video is None else min(int(steps * config.sample.strength), steps)

"""Generate videos from prompts (and images) with and without the adapter, through diffusers' own pipelines."""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline
from diffusers.utils.logging import disable_progress_bar
from PIL import Image

from shared import console
from shared.config import Config
from shared.device import DTYPES, choose_device
from shared.errors import UsageError, one_line
from shared.model.adapters import PREFIX, read_lora
from shared.model.conventions import Conventions, drop_learned_table, read_conventions
from shared.model.pretrained import pretrained_config, pretrained_part
from shared.run_folder import EXPORT, adapter_file
from shared.video import contact_sheet, write_mp4

logger = logging.getLogger(__name__)


def sample(config: Config) -> list[Path]:
    """Write two mp4s (base and LoRA, from the same noise) and a contact sheet per prompt; return the paths.

    Raises `UsageError` if there are no prompts or a part of the model is missing.
    """
    settings = config.sample
    if not settings.prompts:
        raise UsageError('sample.prompts: must not be empty; set for example sample.prompts=["a grey rabbit yawns"]')
    adapter = find_adapter(config)
    pipeline, conventions = load_pipeline(config)
    images = load_images(config, conventions.image_to_video)
    load_adapter(pipeline, adapter)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()
    written: list[Path] = []
    with console.Progress("videos", 2 * len(settings.prompts)) as bar:
        for number, prompt in enumerate(settings.prompts):
            stem = f"{number:02}-{slug(prompt)}"
            videos: dict[str, np.ndarray] = {}
            for kind in ("base", "lora"):
                pipeline.enable_lora() if kind == "lora" else pipeline.disable_lora()
                videos[kind] = make_video(config, pipeline, conventions, prompt, images[number] if images else None)
                written.append(write_mp4(settings.output_dir / f"{stem}-{kind}.mp4", videos[kind], settings.fps))
                bar.advance()
            sheet = settings.output_dir / f"{stem}.png"
            contact_sheet(list(videos.items())).save(sheet)
            written.append(sheet)
    for path in written:
        console.say(str(path))
    return written


def find_adapter(config: Config) -> Path:
    """Return the file of `sample.lora`, or of the run's export; raises `UsageError` if there is none."""
    path = adapter_file(config.sample.lora or config.train.output_dir / EXPORT)
    if not path.is_file():
        raise UsageError(f"{path}: adapter not found; train first, or set sample.lora to a .safetensors file")
    return path


def load_adapter(pipeline: Any, path: Path) -> None:
    """Load a LoRA of any common format into the pipeline's transformer, with its own alpha.

    Raises `UsageError` if the file is not a LoRA of this model, or changes nothing, and `DataError` if damaged.
    """
    modules = (name for name, layer in pipeline.transformer.named_modules() if hasattr(layer, "in_features"))
    found = read_lora(path, modules, "sample.lora")
    if not any(bool(value.any()) for name, value in found.weights.items() if "lora_B" in name):
        raise UsageError(f"{path}: every lora_B is zero, so the adapter changes nothing; use a trained adapter")
    if found.alpha is None:
        logger.warning("%s: the file has no alpha; alpha = rank = %d is used", path, found.rank)
    settings = {"r": found.rank, "lora_alpha": found.alpha or found.rank, "target_modules": found.modules}
    settings |= {name: True for name in ("use_rslora", "use_dora") if getattr(found, name)}
    try:
        pipeline.load_lora_into_transformer(
            {f"{PREFIX}{name}": value for name, value in found.weights.items()},
            pipeline.transformer,
            metadata={f"{PREFIX}{name}": value for name, value in settings.items()},
        )
    except (RuntimeError, ValueError, KeyError) as error:
        model = pipeline.config._name_or_path
        raise UsageError(f"{path}: not an adapter of {model} ({one_line(error)}); use another file") from error


def load_pipeline(config: Config) -> tuple[Any, Conventions]:
    """Load diffusers' text-to-video or image-to-video pipeline, by the checkpoint's configs."""
    part = pretrained_part(config.model, "transformer")
    vae = pretrained_part(config.model, "vae")
    scheduler = pretrained_config(config.model, "scheduler")
    drop = config.model.drop_learned_positions
    conventions = read_conventions(part.config, vae.config, scheduler, drop_learned_positions=drop)
    precision = part.precision(config.sample.dtype)
    kind = CogVideoXImageToVideoPipeline if conventions.image_to_video else CogVideoXPipeline
    pipeline = kind.from_pretrained(
        config.model.pretrained_model_name_or_path,
        revision=config.model.revision,
        variant=config.model.variant,
        cache_dir=config.model.model_cache_dir,
        dtype=DTYPES[precision],
        use_safetensors=True,
    )
    if drop:
        drop_learned_table(pipeline.transformer)
    device = choose_device(config.sample.device)
    if device.type == "cuda":
        pipeline.enable_model_cpu_offload(device=device)
        pipeline.vae.enable_tiling()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, conventions


def load_images(config: Config, image_to_video: bool) -> list[Any]:
    """Read one first frame per prompt, for image-to-video checkpoints only; raises `UsageError`."""
    images, prompts = config.sample.images, config.sample.prompts
    if not image_to_video:
        if images:
            raise UsageError("sample.images: must be empty for a text-to-video checkpoint; remove the field")
        return []
    if len(images) != len(prompts):
        raise UsageError(
            f"sample.images: expected {len(prompts)}, one per prompt, got {len(images)}; add or remove images"
        )
    loaded = []
    for path in images:
        try:
            loaded.append(Image.open(path).convert("RGB"))
        except OSError as error:
            raise UsageError(f"sample.images: {path} is not a readable image ({error}); replace the file") from None
    return loaded


def make_video(config: Config, pipeline: Any, conventions: Conventions, prompt: str, image: Any) -> np.ndarray:
    """Generate one video, uint8 [F,H,W,3]; the noise depends on `sample.seed` alone."""
    settings = config.sample
    frames = pipeline(
        prompt=prompt,
        negative_prompt=config.data.negative_prompt,
        num_frames=settings.num_frames,
        height=settings.height,
        width=settings.width,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        use_dynamic_cfg=settings.use_dynamic_cfg,
        max_sequence_length=conventions.text_length,
        generator=torch.Generator().manual_seed(settings.seed),
        output_type="np",
        **({} if image is None else {"image": image}),
    ).frames[0]
    return (np.asarray(frames) * 255).round().astype(np.uint8)


def slug(prompt: str) -> str:
    """Return the prompt as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "empty"

"""The latents that training saved as previews, made into videos by the VAE alone."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sample.report import Report, reporting
from sample.video import contact_sheet, write_mp4
from shared import console
from shared.atomic_files import replacing
from shared.config import Config
from shared.device import DTYPES, choose_device
from shared.errors import DataError, UsageError
from shared.model.pretrained import pretrained_part
from shared.run_folder import PREVIEWS, SHEET


def decode(config: Config) -> list[Path]:
    """Write mp4s and a contact sheet for each step of the run folder's previews that has no sheet yet; the paths.

    They also go to the tracker of `train.report_to`. Raises `UsageError` if there are no previews or no tracker,
    `DataError` naming a preview that is damaged.
    """
    folder = config.train.output_dir / PREVIEWS
    steps = sorted({path.parent for path in folder.glob("step-*/[0-9]*.safetensors")}, key=_number)
    if not steps:
        raise UsageError(f"{folder}: no previews here; set train.preview_steps and data.validation_prompts, then train")
    todo = [step for step in steps if not (step / SHEET).exists()]
    if not todo:
        console.say(f"{folder}: all previews are decoded already")
        return []
    written: list[Path] = []
    with reporting(config.train) as report:
        vae = load_vae(config)
        with console.Progress("steps", len(todo)) as bar:
            for step in todo:
                written += decode_step(vae, step, config.sample.fps, report)
                bar.advance()
    for path in written:
        console.say(str(path))
    return written


def decode_step(vae: Any, step: Path, fps: int, report: Report) -> list[Path]:
    """The mp4s of one step's previews and, when the tracker has them, their contact sheet; the paths."""
    videos = {
        path.with_suffix(".mp4"): decode_latents(vae, load_latents(path, vae.config.latent_channels))
        for path in sorted(step.glob("[0-9]*.safetensors"), key=lambda path: (len(path.name), path.name))
    }
    for path, frames in videos.items():
        write_mp4(path, frames, fps)
    sheet = contact_sheet([(f"{step.name}/{path.stem}", frames) for path, frames in videos.items()])
    report(_number(step), sheet, list(videos))
    with replacing(step / SHEET) as pending:
        sheet.save(pending, format="PNG")
    return [*videos, step / SHEET]


def _number(step: Path) -> int:
    """`step-000100` -> 100; raises `DataError` for another name."""
    try:
        return int(step.name.removeprefix("step-"))
    except ValueError:
        raise DataError(f"{step}: not a folder of previews; move it away") from None


def load_vae(config: Config) -> Any:
    """diffusers' `AutoencoderKLCogVideoX` without its encoder, on `sample.device`; auto precision is its own."""
    from diffusers import AutoencoderKLCogVideoX

    part = pretrained_part(config.model, "vae")
    precision = part.precision(config.sample.dtype)
    vae = AutoencoderKLCogVideoX.from_pretrained(
        str(part.folder), variant=part.variant, use_safetensors=True, dtype=DTYPES[precision]
    )
    vae.encoder = None
    device = choose_device(config.sample.device)
    if device.type == "cuda":
        vae.enable_tiling()
    return vae.eval().requires_grad_(False).to(device)


def load_latents(path: Path, channels: int) -> torch.Tensor:
    """[F,C,H,W], scaled; raises `DataError` naming the file."""
    try:
        latents = load_file(path)["latents"]
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"shape {tuple(latents.shape)}")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{path}: not a preview's latents ({error}); delete the file to do without it") from None
    return latents


@torch.no_grad()
def decode_latents(vae: Any, latents: torch.Tensor) -> np.ndarray:
    """[F,C,H,W] -> uint8 [F',H',W',3]. Source: `decode_latents` and `VideoProcessor` of diffusers' pipelines."""
    unscaled = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor
    frames = vae.decode(unscaled.transpose(0, 1)[None]).sample[0].float()
    shown = (frames / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0)
    return np.asarray(shown.mul(255).round().byte().cpu())

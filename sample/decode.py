"""Decode the latents that training saved as previews; only the VAE is loaded."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from shared import console
from shared.atomic_files import replacing
from shared.config import Config
from shared.device import choose_device
from shared.errors import DataError, UsageError
from shared.model.vae import decode_latents, load_decoder
from shared.run_folder import PREVIEWS, SHEET
from shared.video import contact_sheet, write_mp4


def decode(config: Config) -> list[Path]:
    """Decode every step of previews that has no contact sheet yet; return the paths written.

    Raises `UsageError` if there are no previews, and `DataError` for a damaged preview.
    """
    folder = config.train.output_dir / PREVIEWS
    steps = sorted({path.parent for path in folder.glob("step-*/[0-9]*.safetensors")})
    if not steps:
        advice = "set train.preview_steps and data.validation_prompts, then train"
        raise UsageError(f"{folder}: no previews found; {advice}")
    missing = [step for step in steps if not (step / SHEET).exists()]
    if not missing:
        console.say(f"{folder}: all previews are decoded already")
        return []
    written: list[Path] = []
    with console.Progress("steps", len(missing)) as bar:
        vae = load_decoder(config.model, config.sample.dtype, choose_device(config.sample.device))
        for step in missing:
            written += decode_step(vae, step, config.sample.fps)
            bar.advance()
    for path in written:
        console.say(str(path))
    return written


def decode_step(vae: Any, step: Path, fps: int) -> list[Path]:
    """Write the mp4s of one step, then the contact sheet that marks the step as decoded."""
    videos = {
        path.with_suffix(".mp4"): decode_latents(vae, load_latents(path, vae.config.latent_channels))
        for path in sorted(step.glob("[0-9]*.safetensors"))
    }
    for path, frames in videos.items():
        write_mp4(path, frames, fps)
    sheet = contact_sheet([(f"{step.name}/{path.stem}", frames) for path, frames in videos.items()])
    with replacing(step / SHEET) as pending:
        sheet.save(pending, format="PNG")
    return [*videos, step / SHEET]


def load_latents(path: Path, channels: int) -> torch.Tensor:
    """Read a preview's latents [F,C,H,W], scaled; raises `DataError` naming the file."""
    try:
        latents = load_file(path)["latents"]
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"expected [F,{channels},H,W], got shape {tuple(latents.shape)}")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{path}: not a preview's latents ({error}); delete the file") from None
    return latents

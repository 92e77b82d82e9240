"""Decode the latents that training saved as previews; only the VAE is loaded."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from shared import console
from shared.atomic_files import replacing
from shared.config import Config, Train
from shared.device import choose_device
from shared.errors import DataError, UsageError
from shared.model.vae import decode_latents, load_decoder
from shared.run_folder import PREVIEWS, SHEET, require_tracker, starting_tracker, wandb_options
from shared.video import contact_sheet, write_mp4

Report = Callable[[int, Image.Image, Sequence[Path]], None]
"""Sends a step's contact sheet and mp4s to a tracker."""


def decode(config: Config) -> list[Path]:
    """Decode every step of previews that has no contact sheet yet, for the tracker too; return the paths written.

    Raises `UsageError` if there are no previews or no tracker, and `DataError` for a damaged preview.
    """
    folder = config.train.output_dir / PREVIEWS
    found = {path.parent for path in folder.glob("step-*/[0-9]*.safetensors")}
    steps = sorted((step for step in found if step.name.removeprefix("step-").isdecimal()), key=_number)
    if not steps:
        advice = "set train.preview_steps and data.validation_prompts, then train"
        raise UsageError(f"{folder}: no previews found; {advice}")
    missing = [step for step in steps if not (step / SHEET).exists()]
    if not missing:
        console.say(f"{folder}: all previews are decoded already")
        return []
    written: list[Path] = []
    with open_report(config.train) as report, console.Progress("steps", len(missing)) as bar:
        vae = load_decoder(config.model, config.sample.dtype, choose_device(config.sample.device))
        for step in missing:
            written += decode_step(vae, step, config.sample.fps, report)
            bar.advance()
    for path in written:
        console.say(str(path))
    return written


def decode_step(vae: Any, step: Path, fps: int, report: Report) -> list[Path]:
    """Write the mp4s of one step, report them, then write the contact sheet that marks the step as decoded."""
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
    """Return 100 for `step-000100`."""
    return int(step.name.removeprefix("step-"))


@contextmanager
def open_report(train: Train) -> Iterator[Report]:
    """Open the tracker of `train.report_to`: TensorBoard shows contact sheets, wandb plays videos.

    Raises `UsageError` if the tracker is not installed or does not start.
    """
    require_tracker(train)
    if train.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(train.output_dir / train.tracker_name)) as writer:  # accelerate's folder
            yield lambda step, sheet, _: writer.add_image("previews", np.asarray(sheet), step, dataformats="HWC")
    elif train.report_to == "wandb":
        import wandb

        with starting_tracker(train):
            opened = wandb.init(project=train.tracker_name, **wandb_options(train))
        with opened as run:
            run.define_metric("previews/*", step_metric="previews/step")  # wandb drops values of a past step
            yield lambda step, _, videos: run.log(
                {"previews/step": step}
                | {f"previews/{path.stem}": wandb.Video(str(path), format="mp4") for path in videos}
            )
    else:
        yield lambda step, sheet, videos: None


def load_latents(path: Path, channels: int) -> torch.Tensor:
    """Read a preview's latents [F,C,H,W], scaled; raises `DataError` naming the file."""
    try:
        latents = load_file(path)["latents"]
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"expected [F,{channels},H,W], got shape {tuple(latents.shape)}")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{path}: not a preview's latents ({error}); delete the file") from None
    return latents

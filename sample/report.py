"""Decoded previews, sent to the tracker of the run that made them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from shared.config import Train
from shared.tracker import require_tracker, starting_tracker, tensorboard_folder, wandb_options

Report = Callable[[int, Image.Image, Sequence[Path]], None]
"""Takes a step, its contact sheet and its mp4s."""


@contextmanager
def reporting(train: Train) -> Iterator[Report]:
    """Open the tracker of `train.report_to`: TensorBoard shows contact sheets, wandb plays videos.

    Raises `UsageError` if it is not installed or does not start.
    """
    require_tracker(train)
    if train.report_to == "tensorboard":
        with _tensorboard(train) as report:
            yield report
    elif train.report_to == "wandb":
        with _wandb(train) as report:
            yield report
    else:
        yield lambda step, sheet, videos: None


@contextmanager
def _tensorboard(train: Train) -> Iterator[Report]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tensorboard_folder(train))) as writer:
        yield lambda step, sheet, videos: writer.add_image("previews", np.asarray(sheet), step, dataformats="HWC")


@contextmanager
def _wandb(train: Train) -> Iterator[Report]:
    """wandb drops what is logged for a step before its last one, so the step of a preview is a value beside it."""
    import wandb

    with starting_tracker(train):
        opened = wandb.init(project=train.tracker_name, **wandb_options(train))
    with opened as run:
        run.define_metric("previews/*", step_metric="previews/step")

        def report(step: int, sheet: Image.Image, videos: Sequence[Path]) -> None:
            shown = {f"previews/{path.stem}": wandb.Video(str(path), format="mp4") for path in videos}
            run.log({"previews/step": step, **shown})

        yield report

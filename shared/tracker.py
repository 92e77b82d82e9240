"""The tracker of `train.report_to`: its files in the run folder, shared by training and `precog decode`."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.config import Train
from shared.errors import UsageError
from shared.extras import require_extra

WANDB_ID = "wandb-id.txt"
"""File of the run folder with wandb's run id, so that a resumed run and its previews stay one run."""


def require_tracker(train: Train) -> None:
    """Raise `UsageError` if the tracker's package is not installed."""
    if train.report_to != "none":
        require_extra(train.report_to, f"train.report_to = {train.report_to!r}", train.report_to)


@contextmanager
def starting_tracker(train: Train) -> Iterator[None]:
    """Turn any error of a tracker's start into a `UsageError` of one line."""
    try:
        yield
    except Exception as error:
        hint = "; run `wandb login` or set WANDB_MODE=offline" if train.report_to == "wandb" else ""
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UsageError(f"train.report_to = {train.report_to!r}: {reason}{hint}") from error


def tensorboard_folder(train: Train) -> Path:
    """Return the folder that accelerate's TensorBoard tracker writes to, given the run folder for its logs."""
    return train.output_dir / train.tracker_name


def wandb_options(train: Train) -> dict[str, Any]:
    """Return the arguments of `wandb.init` for the run folder; writes the run id on the first call."""
    path = train.output_dir / WANDB_ID
    if not path.exists():
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return {"dir": str(train.output_dir), "id": path.read_text(encoding="utf-8").strip(), "resume": "allow"}

"""The tracker that `train.report_to` names: where a run's data is, for training and for what decodes its previews."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.config import Train
from shared.errors import UsageError
from shared.extras import require_extra

WANDB_ID = "wandb-id.txt"
"""In the run folder: what makes a resumed run, and its previews, the same run for wandb."""


def require_tracker(train: Train) -> None:
    """Raises `UsageError` if the tracker is not installed."""
    if train.report_to != "none":
        require_extra(train.report_to, f"train.report_to = {train.report_to!r}", train.report_to)


@contextmanager
def starting_tracker(train: Train) -> Iterator[None]:
    """Around a tracker's start: whatever its library raises becomes a `UsageError` of one line."""
    try:
        yield
    except Exception as error:
        hint = "; log in with `wandb login`, or set WANDB_MODE=offline" if train.report_to == "wandb" else ""
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UsageError(f"train.report_to = {train.report_to!r}: {reason}{hint}") from error


def tensorboard_folder(train: Train) -> Path:
    """Where accelerate's tracker writes, given the run folder as its logging folder."""
    return train.output_dir / train.tracker_name


def wandb_options(train: Train) -> dict[str, Any]:
    """For `wandb.init` beside the project: files in the run folder, and one id for ever, made if there is none."""
    path = train.output_dir / WANDB_ID
    if not path.exists():
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return {"dir": str(train.output_dir), "id": path.read_text(encoding="utf-8").strip(), "resume": "allow"}

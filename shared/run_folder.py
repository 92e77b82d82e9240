"""Files of a run folder that several commands share: export, previews, `metrics.jsonl` and the tracker's own."""

import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shared.config import Train
from shared.errors import DataError, UsageError, one_line, require_extra

EXPORT = "export"
"""Folder of the finished adapter."""
BEST = "best"
"""Folder in the export with the adapter of the lowest held-out loss so far."""
ADAPTER = "pytorch_lora_weights.safetensors"
"""File that diffusers' `load_lora_weights` looks for (`diffusers/loaders/lora_base.py`)."""
PREVIEWS = "previews"
"""Folder of previews: `step-000100/00.safetensors` and `.json`, and the images of `precog decode`."""
SHEET = "sheet.png"
"""File that `precog decode` writes last into a step's folder; a folder that has it is decoded."""
METRICS = "metrics.jsonl"
"""One JSON object per optimizer step, written by training and read by the pages."""
EVENTS = "events.jsonl"
"""One JSON object per start, resume, signal and end, with the versions and the device of that start."""
LOG = "run.log"
"""What a training process said, with times."""
PAGE = "report.html"
"""The run's page, written by `precog report run`."""
METRICS_NUMBERS = ("step", "loss", "ema_loss", "samples", "seconds", "data_wait_seconds", "peak_memory_bytes")
"""Fields that every line of `metrics.jsonl` must have."""
WANDB_ID = "wandb-id.txt"
"""File with wandb's run id, so that a resumed run and its previews stay one run."""


def adapter_file(place: Path) -> Path:
    """Return the adapter in an export folder, or `place` itself if it is a file; neither need exist."""
    return place / ADAPTER if place.is_dir() else place


def adapter_rank(place: Path, field: str) -> int:
    """Read the rank of a LoRA from its header. Raise `UsageError`, naming `field`, for a file without one rank."""
    from safetensors import SafetensorError, safe_open

    where, path = f"{field} = {str(place)!r}", adapter_file(place)
    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{where}: cannot be read as a LoRA ({one_line(error)}); name a .safetensors file") from None
    ranks = {shape[0] for name, shape in shapes.items() if re.search(r"lora_A|lora[_.]down", name) and shape}
    if len(ranks) != 1:
        raise UsageError(f"{where}: expected a LoRA of one rank, got ranks {sorted(ranks)}; use another file")
    return int(ranks.pop())


def preview_file(run: Path, step: int, number: int) -> Path:
    """Return the file with the latents of a step's prompt `number`."""
    return run / PREVIEWS / f"step-{step:06}" / f"{number:02}.safetensors"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read the steps so far; a torn last line is left out. Raise `DataError` for any other line that is not a step."""
    path = run / METRICS
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    try:
        steps = [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON lines ({error}); move the file away to go on") from None
    for number, step in enumerate(steps, start=1):
        if not isinstance(step, dict) or not all(isinstance(step.get(name), int | float) for name in METRICS_NUMBERS):
            raise DataError(f"{path} line {number}: not a step of a run; move the file away to go on")
    return steps


def add_event(run: Path, event: str, **facts: Any) -> None:
    """Append an event with its time to events.jsonl."""
    line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **facts}
    with (run / EVENTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_events(run: Path) -> list[dict[str, Any]]:
    """Read the events so far; damaged lines are left out."""
    events: list[dict[str, Any]] = []
    with suppress(OSError):
        for line in (run / EVENTS).read_bytes().split(b"\n"):
            with suppress(ValueError):
                events.append(dict(json.loads(line)))
    return events


def require_tracker(train: Train) -> None:
    """Raise `UsageError` if the package of `train.report_to` is not installed."""
    if train.report_to != "none":
        require_extra(train.report_to, f"train.report_to = {train.report_to!r}", train.report_to)


@contextmanager
def starting_tracker(train: Train) -> Iterator[None]:
    """Turn any error of a tracker's start into a `UsageError` of one line."""
    try:
        yield
    except Exception as error:
        hint = "; run `wandb login` or set WANDB_MODE=offline" if train.report_to == "wandb" else ""
        raise UsageError(f"train.report_to = {train.report_to!r}: {one_line(error).rstrip('.')}{hint}") from error


def wandb_options(train: Train) -> dict[str, Any]:
    """Return the arguments of `wandb.init` for the run folder; write the run id on the first call."""
    path = train.output_dir / WANDB_ID
    if not path.exists():
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return {"dir": str(train.output_dir), "id": path.read_text(encoding="utf-8").strip(), "resume": "allow"}

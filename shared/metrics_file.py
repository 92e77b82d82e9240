"""`metrics.jsonl` of a run folder: one JSON object per optimizer step, written by training and read by the pages."""

import json
from pathlib import Path
from typing import Any

from shared.errors import DataError

FILE_NAME = "metrics.jsonl"
NUMBERS = ("step", "loss", "ema_loss", "samples", "seconds", "data_wait_seconds", "peak_memory_bytes")
"""Fields that every line must have."""


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read the steps so far; a torn last line is left out. Raise `DataError` for any other line that is not a step."""
    path = run / FILE_NAME
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    try:
        steps = [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON lines ({error}); move the file away to go on") from None
    for number, step in enumerate(steps, start=1):
        if not isinstance(step, dict) or not all(isinstance(step.get(name), int | float) for name in NUMBERS):
            raise DataError(f"{path} line {number}: not a step of a run; move the file away to go on")
    return steps

"""`metrics.jsonl`, one object per optimizer step, and the same in one fixed-width line for people."""

import json
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from shared import console
from shared.atomic_files import replacing
from shared.config import Config
from shared.errors import DataError
from shared.tracker import starting_tracker, wandb_options
from train.curve import FILE_NAME as CURVE
from train.curve import draw_curve

FILE_NAME = "metrics.jsonl"
NUMBERS = ("step", "loss", "samples", "seconds", "data_wait_seconds", "peak_memory_bytes")
"""Which every line has and which are read again."""
EMA_DECAY = 0.98
"""Of the smoothed loss, per optimizer step: about the last 50 steps."""
RECENT_STEPS = 50
"""Whose mean the time left is reckoned by, with what lay between them: evaluations, previews, saves."""


class Metrics:
    """Appends to the run's metrics; on resume, lines beyond the checkpoint's step are cut off first."""

    def __init__(self, run: Path, step: int, num_steps: int) -> None:
        self._ends = deque([time.monotonic()], maxlen=RECENT_STEPS + 1)
        self._path = run / FILE_NAME
        self._num_steps = num_steps
        kept = [line for line in read_metrics(run) if line["step"] <= step]
        self._average = EmaLoss()
        for line in kept:
            self._average.add(line["loss"])
        self.base_held_out_loss = _first(kept, "base_held_out_loss")
        """Without the adapter, once it has been written."""
        self.last = kept[-1] if kept else {}
        """The line of the last step."""
        if kept or self._path.exists():
            self._replace(kept)

    def write(self, line: dict[str, Any]) -> dict[str, Any]:
        """Append one step and show it; the line as written, which has its `ema_loss`."""
        line = {"step": line["step"], "loss": line["loss"], "ema_loss": self._average.add(line["loss"]), **line}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        console.say(self._row(line))
        self.last = line
        return line

    def add(self, losses: dict[str, float]) -> None:
        """Add held-out losses to the last line, and show them."""
        self.last |= losses
        self._replace([*read_metrics(self._path.parent)[:-1], self.last])
        if self.base_held_out_loss is None:
            self.base_held_out_loss = losses.get("base_held_out_loss")
        base = f", {self.base_held_out_loss:.5f} without the adapter" if self.base_held_out_loss is not None else ""
        console.say(f"{'held out':>11} {losses['held_out_loss']:>9.5f}{base}")

    def _replace(self, lines: Sequence[dict[str, Any]]) -> None:
        with replacing(self._path) as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def header(self) -> None:
        """The names above the fixed-width lines."""
        console.say(
            f"{'step':>11} {'loss':>9} {'EMA loss':>9} {'lr':>9} {'grad':>9} {'clips/s':>8} {'tokens/s':>9} "
            f"{'wait':>6} {'memory':>10} {'left':>8}"
        )

    def _row(self, line: dict[str, Any]) -> str:
        seconds = max(line["seconds"], 1e-9)
        self._ends.append(time.monotonic())
        left = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) * (self._num_steps - line["step"])
        return (
            f"{line['step']:>5}/{self._num_steps:<5} {line['loss']:>9.5f} {line['ema_loss']:>9.5f} "
            f"{line['lr']:>9.2e} {line['grad_norm']:>9.4f} {line['samples'] / seconds:>8.2f} "
            f"{line['tokens'] / seconds:>9.0f} {line['data_wait_seconds'] / seconds:>6.1%} "
            f"{console.bytes_text(line['peak_memory_bytes']):>10} {_duration(left):>8}"
        )


class EmaLoss:
    """Exponential moving average, bias-corrected (Kingma & Ba 2015, arXiv 1412.6980, section 3).

    It follows from the losses alone, so a resumed run goes on from those in its metrics to the last bit.
    """

    def __init__(self) -> None:
        self._sum = 0.0
        self._weight = 0.0

    def add(self, loss: float) -> float:
        """The average after one more step."""
        self._sum = EMA_DECAY * self._sum + (1 - EMA_DECAY) * loss
        self._weight = EMA_DECAY * self._weight + (1 - EMA_DECAY)
        return self._sum / self._weight


def smoothed(lines: Sequence[dict[str, Any]]) -> list[float]:
    """The EMA loss after each step."""
    average = EmaLoss()
    return [average.add(line["loss"]) for line in lines]


def finish_metrics(run: Path, export: Path) -> None:
    """Draw the loss curve and show the run's table; of both only the export, if the metrics were moved away."""
    lines = read_metrics(run)
    if not lines:
        console.table("Trained", [("adapter", export)])
        return
    smooth = smoothed(lines)
    draw_curve(lines, smooth, run / CURVE)
    seconds = sum(line["seconds"] for line in lines)
    waited = sum(line["data_wait_seconds"] for line in lines)
    held_out, base = _first(lines[::-1], "held_out_loss"), _first(lines, "base_held_out_loss")
    rows: list[tuple[str, Any]] = [
        ("steps", lines[-1]["step"]),
        ("EMA loss", f"{smooth[0]:.5f} -> {smooth[-1]:.5f}"),
        ("held-out loss", "no clips held out" if held_out is None else f"{held_out:.5f}"),
        ("without the adapter", "-" if base is None else f"{base:.5f}"),
        ("clips per second", f"{sum(line['samples'] for line in lines) / seconds:.2f}"),
        ("waiting for data", f"{waited / seconds:.2%} of {_duration(seconds)}"),
        ("peak memory", console.bytes_text(max(line["peak_memory_bytes"] for line in lines))),
        ("loss curve", run / CURVE),
        ("adapter", export),
    ]
    console.table("Trained", rows)


def open_tracker(accelerator: Accelerator, config: Config) -> None:
    """Start the tracker of `train.report_to`, if any, with the resolved config; raises `UsageError` if it will not."""
    train = config.train
    if train.report_to == "none":
        return
    tables = config.model_dump(mode="json", exclude_none=True)
    flat = {f"{table}.{name}": value for table, fields in tables.items() for name, value in fields.items()}
    plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in flat.items()}
    ours = train.report_to == "wandb" and accelerator.is_main_process
    options = {"wandb": wandb_options(train)} if ours else {}
    with starting_tracker(train):
        accelerator.init_trackers(train.tracker_name, config=plain, init_kwargs=options)


def track(accelerator: Accelerator, line: dict[str, Any]) -> None:
    """Send a step's numbers to the tracker, if there is one."""
    accelerator.log({name: value for name, value in line.items() if isinstance(value, int | float)}, line["step"])


def _first(lines: Sequence[dict[str, Any]], field: str) -> Any:
    return next((line[field] for line in lines if field in line), None)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The steps so far; a torn last line is left out. Raises `DataError` for any other line that is not a step's."""
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


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"

"""`metrics.jsonl`, one object per optimizer step, and the same in one fixed-width line for people."""

import json
import math
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from shared import console
from shared.atomic_files import replacing
from shared.config import Config
from shared.run_folder import METRICS, read_metrics, starting_tracker, wandb_options
from train.checkpoint.files import sync_file

CURVE = "loss.png"
EMA_DECAY = 0.98
"""Decay of the smoothed loss per optimizer step: about the last 50 steps."""
RECENT_STEPS = 50
"""Steps whose mean time, with evaluations, previews and saves between them, gives the time left."""
HEADER = (
    f"{'step':>11} {'loss':>9} {'EMA loss':>9} {'lr':>9} {'grad':>9} {'clips/s':>8} {'tokens/s':>9} "
    f"{'wait':>6} {'memory':>10} {'left':>8}"
)
"""Names above the fixed-width lines."""
MIN_CURVE_STEPS, MAX_CURVE_POINTS = 20, 2000
"""A shorter run has no loss.png; a longer one's curves are thinned to so many points."""


class Metrics:
    """The run's metrics, appended line by line; on resume, lines beyond the checkpoint's step are removed first."""

    def __init__(self, run: Path, step: int, num_steps: int) -> None:
        self._ends = deque([time.monotonic()], maxlen=RECENT_STEPS + 1)
        self._path = run / METRICS
        self._num_steps = num_steps
        kept = [line for line in read_metrics(run) if line["step"] <= step]
        self._average = EmaLoss()
        for line in kept:
            self._average.add(line["loss"])
        self.base_held_out_loss = _first(kept, "base_held_out_loss")
        """Held-out loss without the adapter, once it has been written."""
        self._held_out = [_finite(line["held_out_loss"]) for line in kept if "held_out_loss" in line]
        self.last = kept[-1] if kept else {}
        """The line of the last step."""
        if (last := self.last.get("step", 0)) < step:
            console.say(f"{self._path}: steps {last + 1} to {step} are missing; the curve has a gap")
        if kept or self._path.exists():
            self._replace(kept)

    def write(self, line: dict[str, Any]) -> dict[str, Any]:
        """Append and print one step; return the line as written, with its `ema_loss`."""
        line = line | {"ema_loss": self._average.add(line["loss"])}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        seconds = max(line["seconds"], 1e-9)
        self._ends.append(time.monotonic())
        left = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) * (self._num_steps - line["step"])
        console.say(
            f"{line['step']:>5}/{self._num_steps:<5} {line['loss']:>9.5f} {line['ema_loss']:>9.5f} "
            f"{line['lr']:>9.2e} {line['grad_norm']:>9.4f} {line['samples'] / seconds:>8.2f} "
            f"{line['tokens'] / seconds:>9.0f} {line['data_wait_seconds'] / seconds:>6.1%} "
            f"{console.bytes_text(line['peak_memory_bytes']):>10} {timedelta(seconds=int(left))!s:>8}"
        )
        self.last = line
        return line

    def is_lowest(self, held_out_loss: float) -> bool:
        """Compare with the held-out losses so far; one that is not finite is never the lowest."""
        return held_out_loss < min(self._held_out, default=math.inf)

    @property
    def evaluations_without_gain(self) -> int:
        """Number of held-out losses after the lowest one."""
        return len(self._held_out) - 1 - self._held_out.index(min(self._held_out)) if self._held_out else 0

    def add(self, losses: dict[str, Any]) -> None:
        """Add held-out losses to the last line, and print them."""
        self.last |= losses
        self._held_out.append(_finite(losses["held_out_loss"]))
        self._replace([*read_metrics(self._path.parent)[:-1], self.last])
        if self.base_held_out_loss is None:
            self.base_held_out_loss = losses.get("base_held_out_loss")
        base = f", {self.base_held_out_loss:.5f} without the adapter" if self.base_held_out_loss is not None else ""
        console.say(f"{'held out':>11} {losses['held_out_loss']:>9.5f}{base}")

    def sync(self) -> None:
        """Flush the file to disk, before a checkpoint of its last step is committed."""
        if self._path.exists():
            sync_file(self._path)

    def _replace(self, lines: Sequence[dict[str, Any]]) -> None:
        with replacing(self._path) as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


class EmaLoss:
    """Exponential moving average, bias-corrected (Kingma & Ba 2015, arXiv 1412.6980, section 3).

    It depends on the losses alone, so a resumed run continues it bit for bit from the losses in its metrics.
    """

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, loss: float) -> float:
        """Add one step's loss and return the average."""
        self._sum = EMA_DECAY * self._sum + (1 - EMA_DECAY) * loss
        self._weight = EMA_DECAY * self._weight + (1 - EMA_DECAY)
        return self._sum / self._weight


def finish_metrics(run: Path, export: Path) -> None:
    """Draw loss.png if the run has 20 steps, and print its table; only the export if the metrics are missing."""
    lines = read_metrics(run)
    if not lines:
        console.table("Trained", [("adapter", export)])
        return
    if len(lines) >= MIN_CURVE_STEPS:
        draw_curve(lines, run / CURVE)
    seconds, waited = (sum(line[name] for line in lines) for name in ("seconds", "data_wait_seconds"))
    held_out, base = _first(lines[::-1], "held_out_loss"), _first(lines, "base_held_out_loss")
    rows: list[tuple[str, Any]] = [
        ("steps", lines[-1]["step"]),
        ("EMA loss", f"{lines[0]['ema_loss']:.5f} -> {lines[-1]['ema_loss']:.5f}"),
        ("held-out loss", "no clips held out" if held_out is None else f"{held_out:.5f}"),
        ("without the adapter", "-" if base is None else f"{base:.5f}"),
        ("clips per second", f"{sum(line['samples'] for line in lines) / seconds:.2f}"),
        ("waiting for data", f"{waited / seconds:.2%} of {timedelta(seconds=int(seconds))}"),
        ("peak memory", console.bytes_text(max(line["peak_memory_bytes"] for line in lines))),
        ("loss curve", run / CURVE if len(lines) >= MIN_CURVE_STEPS else f"drawn from {MIN_CURVE_STEPS} steps on"),
        ("adapter", export),
    ]
    console.table("Trained", rows)


def draw_curve(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot the losses of metrics.jsonl over the optimizer steps as a PNG."""
    import altair

    curves, every = ["loss", "ema_loss", "held_out_loss", "base_held_out_loss"], -(-len(lines) // MAX_CURVE_POINTS)
    shown = [line for line in lines if line["step"] % every == 0 or "held_out_loss" in line]
    values = [{name: line[name] for name in ("step", *curves) if name in line} for line in shown]
    chart = altair.Chart(altair.InlineData(values=values), width=900, height=450).mark_line(point=len(shown) < 100)
    chart = chart.transform_fold(curves, as_=["curve", "value"]).transform_filter("isValid(datum.value)")
    loss = altair.Y("value:Q", title="velocity loss").scale(zero=False)
    chart = chart.encode(x=altair.X("step:Q", title="optimizer step"), y=loss, color=altair.Color("curve:N", title=""))
    with replacing(path) as pending:
        chart.save(str(pending), format="png")


def open_tracker(accelerator: Accelerator, config: Config) -> None:
    """Start the tracker of `train.report_to`, if any, with the resolved config; raises `UsageError` if it fails."""
    train = config.train
    if train.report_to == "none":
        return
    tables = config.model_dump(mode="json", exclude_none=True)
    flat = {f"{table}.{name}": value for table, fields in tables.items() for name, value in fields.items()}
    plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in flat.items()}
    with starting_tracker(train):
        is_wandb = train.report_to == "wandb" and accelerator.is_main_process
        options = {"wandb": wandb_options(train)} if is_wandb else {}
        accelerator.init_trackers(train.tracker_name, config=plain, init_kwargs=options)


def track(accelerator: Accelerator, line: dict[str, Any]) -> None:
    """Send a step's numbers to the tracker, if there is one."""
    accelerator.log({name: value for name, value in line.items() if isinstance(value, int | float)}, line["step"])


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _first(lines: Sequence[dict[str, Any]], field: str) -> Any:
    return next((line[field] for line in lines if field in line), None)

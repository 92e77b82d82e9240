"""`metrics.jsonl`, one object per optimizer step, and its numbers in one updating line for people."""

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
from shared.atomic_files import replacing, sync_file, sync_folder
from shared.config import Config
from shared.run_folder import ADAPTER, BEST, EXPORT, METRICS, PAGE, read_metrics, starting_tracker, wandb_options
from train.events import PageProcess

EMA_DECAY = 0.98
"""Decay of the smoothed loss per optimizer step: about the last 50 steps."""
RECENT_STEPS = 50
"""Steps whose mean time, with evaluations, previews and saves between them, gives the time left."""
HEADER = f"{'step':>13} {'loss':>8} {'EMA':>8} {'held out':>8} {'s/step':>7} {'elapsed':>9} {'left':>9} {'memory':>9}"
"""Names above the updating line, which has 78 columns."""
FIRST_STEPS = 20
"""Steps whose mean loss the summary compares the EMA loss with; a shorter run says nothing on a page."""


class Metrics:
    """The run's metrics, appended line by line; on resume, lines beyond the checkpoint's step are removed first."""

    def __init__(self, run: Path, step: int, num_steps: int, log_steps: int = 0) -> None:
        self._line = console.StatusLine()
        self._page = PageProcess(run)
        self._log_steps = log_steps
        self._started = time.monotonic()
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

    def __enter__(self) -> "Metrics":
        console.say(HEADER)
        self._line.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._line.__exit__()
        self._page.finish()

    def write(self, line: dict[str, Any]) -> dict[str, Any]:
        """Append and show one step; return the line as written, with its `ema_loss`."""
        self.last = line = line | {"ema_loss": self._average.add(line["loss"])}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._ends.append(time.monotonic())
        step = line["step"]
        seconds = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        elapsed, left = (
            timedelta(seconds=int(time))
            for time in (self._ends[-1] - self._started, seconds * (self._num_steps - step))
        )
        losses = [line["loss"], line["ema_loss"], *self._held_out[-1:]]
        shown = [f"{text:>8}" for text in [*map(loss_text, losses), "-"][:3]]
        self._line.show(
            f"{f'{step}/{self._num_steps}':>13} {' '.join(shown)} {line['seconds']:>7.2f} {elapsed!s:>9} {left!s:>9} "
            f"{console.bytes_text(line['peak_memory_bytes']):>9}",
            due=step % self._log_steps == 0 if self._log_steps else None,
        )
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
        console.say(f"step {self.last['step']}: {held_out_text(losses['held_out_loss'], self.base_held_out_loss)}")
        if FIRST_STEPS <= self.last["step"] < self._num_steps:
            self._page.start_if_cheap()

    def sync(self) -> None:
        """Flush the file and its name to disk, before a checkpoint of its last step is committed."""
        if self._path.exists():
            sync_file(self._path)
            sync_folder(self._path.parent)

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


def loss_text(loss: float) -> str:
    """Return a loss in at most eight characters: 0.21345 or 1.37e+06."""
    return f"{loss:.5f}" if abs(loss) < 100 else f"{loss:.3g}"


def held_out_text(loss: float, base: float | None) -> str:
    """Return the held-out loss beside the base model's."""
    gain = "" if not base else f", base model {base:.5f}, gain {1 - loss / base:+.1%}"
    return f"held-out loss {loss:.5f}{gain}"


def run_result(run: Path) -> dict[str, Any]:
    """Return what a finished run comes to, as in its table; what was not measured is None."""
    lines = read_metrics(run)
    evaluated = [line for line in lines if "held_out_loss" in line]
    best = min(evaluated, key=lambda line: _finite(line["held_out_loss"]), default=None)
    first = [line["loss"] for line in lines[:FIRST_STEPS]]
    seconds, waited = (sum(line[name] for line in lines) for name in ("seconds", "data_wait_seconds"))
    return {
        "held_out_loss": evaluated[-1]["held_out_loss"] if evaluated else None,
        "base_held_out_loss": _first(lines, "base_held_out_loss"),
        "best_held_out_loss": best and best["held_out_loss"],
        "best_step": best and best["step"],
        "ema_loss": lines[-1]["ema_loss"] if lines else None,
        "first_loss": sum(first) / len(first) if first else None,
        "steps": lines[-1]["step"] if lines else None,
        "seconds": seconds,
        "waited_share": waited / max(seconds, 1e-9),
        "clips_per_second": sum(line["samples"] for line in lines) / max(seconds, 1e-9),
        "peak_memory_bytes": max((line["peak_memory_bytes"] for line in lines), default=None),
        "adapter": str(run / EXPORT / ADAPTER),
        "page": str(run / PAGE) if (run / PAGE).exists() else None,
    }


def finish_metrics(run: Path) -> None:
    """Write the page of a run of 20 steps or more, and print its table, held-out loss first."""
    lines = read_metrics(run)
    if len(lines) >= FIRST_STEPS:
        PageProcess(run).write_last()
    found = run_result(run)
    held_out = "no clips are held out, so nothing says what it has learned"
    if found["held_out_loss"] is not None:
        held_out = held_out_text(found["held_out_loss"], found["base_held_out_loss"])
    rows: list[tuple[str, Any]] = [("adapter", found["adapter"])]
    if lines:
        rows = [("result", held_out)]
        if found["best_step"] not in (None, lines[-1]["step"]):
            folder = run / EXPORT / BEST
            rows.append(("best", f"{found['best_held_out_loss']:.5f} at step {found['best_step']}, in {folder}"))
        first = f"{found['first_loss']:.5f} mean of the first {min(len(lines), FIRST_STEPS)}"
        time_text = f"{timedelta(seconds=int(found['seconds']))}, {found['waited_share']:.2%} waiting"
        rows += [
            ("training loss", f"{found['ema_loss']:.5f} EMA, {first}"),
            ("steps", f"{found['steps']} in {time_text}"),
            ("clips per second", f"{found['clips_per_second']:.2f}"),
            ("peak memory", console.bytes_text(found["peak_memory_bytes"])),
            ("adapter", found["adapter"]),
        ]
    console.table("Trained", rows + ([("page", found["page"])] if found["page"] else []))


def open_tracker(accelerator: Accelerator, config: Config) -> None:
    """Start the tracker of `train.report_to`, if any, with the resolved config; raises `UsageError` if it fails."""
    train = config.train
    if train.report_to == "none":
        return
    tables = config.model_dump(mode="json", exclude_none=True)
    flat = {f"{table}.{name}": value for table, fields in tables.items() for name, value in fields.items()}
    plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in flat.items()}
    with starting_tracker(train):
        options: dict[str, Any] = {}
        if train.report_to == "wandb" and accelerator.is_main_process:
            options = {"wandb": wandb_options(train)}
        elif train.report_to == "trackio":
            options = {"trackio": {"name": train.output_dir.resolve().name, "resume": "allow"}}
        accelerator.init_trackers(train.tracker_name, config=plain, init_kwargs=options)


def track(accelerator: Accelerator, line: dict[str, Any]) -> None:
    """Send a step's numbers to the tracker, if there is one."""
    accelerator.log({name: value for name, value in line.items() if isinstance(value, int | float)}, line["step"])


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _first(lines: Sequence[dict[str, Any]], field: str) -> Any:
    return next((line[field] for line in lines if field in line), None)

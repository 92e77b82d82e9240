"""`metrics.jsonl`, one object per optimizer step, and the same in one fixed-width line for people."""

import json
from pathlib import Path
from typing import Any

from shared import console
from shared.errors import DataError

FILE_NAME = "metrics.jsonl"
EMA_DECAY = 0.98


class Metrics:
    """Appends to the run's metrics; on resume, lines beyond the checkpoint's step are cut off first."""

    def __init__(self, run: Path, step: int, num_steps: int) -> None:
        self._path = run / FILE_NAME
        self._num_steps = num_steps
        self._ema: float | None = None
        kept = [line for line in read_metrics(run) if line["step"] <= step]
        for line in kept:
            self._smooth(line["loss"])
        if kept or self._path.exists():
            pending = self._path.with_name(f".tmp-{FILE_NAME}")
            pending.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            pending.replace(self._path)

    def _smooth(self, loss: float) -> float:
        self._ema = loss if self._ema is None else EMA_DECAY * self._ema + (1 - EMA_DECAY) * loss
        return self._ema

    def write(self, line: dict[str, Any]) -> None:
        """Append one step and show it."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        console.say(self._row(line))

    def header(self) -> None:
        """The names above the fixed-width lines."""
        console.say(
            f"{'step':>11} {'loss':>9} {'smooth':>9} {'lr':>9} {'grad':>9} {'clips/s':>8} {'tokens/s':>9} {'wait':>6} "
            f"{'memory':>10} {'left':>8}"
        )

    def _row(self, line: dict[str, Any]) -> str:
        seconds = max(line["seconds"], 1e-9)
        left = seconds * (self._num_steps - line["step"])
        return (
            f"{line['step']:>5}/{self._num_steps:<5} {line['loss']:>9.5f} {self._smooth(line['loss']):>9.5f} "
            f"{line['lr']:>9.2e} {line['grad_norm']:>9.4f} {line['samples'] / seconds:>8.2f} "
            f"{line['tokens'] / seconds:>9.0f} {line['data_wait_seconds'] / seconds:>6.1%} "
            f"{console.bytes_text(line['peak_memory_bytes']):>10} {_duration(left):>8}"
        )


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The steps so far; a torn last line is left out. Raises `DataError` for any other line that is not JSON."""
    path = run / FILE_NAME
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise DataError(f"{path}: not JSON lines ({error}); move the file away to go on") from None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"

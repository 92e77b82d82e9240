"""Run folders with made metrics, for the tests of the pages."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.report.browser import HOSTILE

GAINS = (0.1, 0.18, 0.22, 0.25, 0.26)
"""Shares of the base loss that a learning run gains at its evaluations."""


def write_run(folder: Path, gains: Sequence[float] = GAINS, *, clips: int = 6, every: int = 10, rank: int = 16) -> Path:
    """Write the config and metrics of a run with one evaluation per gain; clips have hostile names."""
    folder.mkdir(parents=True)
    base = [[(0.4 + 0.1 * clip) * share for share in (1.6, 1.2, 0.8, 0.6, 0.5)] for clip in range(clips)]
    lines = []
    for step in range(1, every * len(gains) + 1):
        lines.append(line(step))
        if step % every == 0:
            gain = gains[step // every - 1]
            cells = [[loss * (1 - gain * (0.9 + 0.04 * clip)) for loss in row] for clip, row in enumerate(base)]
            lines[-1] |= {"held_out_loss": _mean(cells), "held_out_cells": cells}
        if step == every:
            lines[-1] |= {"base_held_out_loss": _mean(base), "base_held_out_cells": base}
            lines[-1] |= {"held_out_clips": [f"{clip} {HOSTILE}" for clip in range(clips)]}
            lines[-1] |= {"timestep_quantiles": [0.1, 0.3, 0.5, 0.7, 0.9]}
    text = f"[train]\noutput_dir = {json.dumps(str(folder))}\nlora_rank = {rank}\nmax_train_steps = {len(lines)}\n"
    (folder / "config.toml").write_text(text, "utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines), "utf-8")
    return folder


def line(step: int) -> dict[str, Any]:
    """Return the line of a training step."""
    loss = 1 / (1 + step / 20)
    return {
        "step": step,
        "loss": loss + 0.05 * (step % 3),
        "ema_loss": loss,
        "lr": 1e-3,
        "grad_norm": 0.5 + step % 4 / 4,
        "samples": 2,
        "tokens": 100,
        "packs": 1,
        "seconds": 0.5,
        "data_wait_seconds": 0.01,
        "peak_memory_bytes": 2**30,
    }


def _mean(cells: Sequence[Sequence[float]]) -> float:
    return sum(map(sum, cells)) / sum(map(len, cells))

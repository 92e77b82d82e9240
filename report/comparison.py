"""The page of several runs: verdicts, differing settings, overlaid curves; for a sweep also costs and effects."""

import csv
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from report import charts
from report.page import write_page
from report.run_page import RunSummary, read_run
from shared.errors import UsageError

SWEEP = "sweep.csv"
"""Written by `precog sweep` into the folder of its runs."""


def is_sweep(folder: Path) -> bool:
    """Return True for a folder that `precog sweep` has finished or stopped in."""
    return (folder / SWEEP).is_file()


def read_sweep(folder: Path) -> tuple[list[RunSummary], dict[str, str]]:
    """Return the runs of a sweep that took a step, and the reasons of those that did not finish."""
    with (folder / SWEEP).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    runs, reasons = [], {}
    for row in rows:
        try:
            runs.append(read_run(folder / row["run"]))
        except UsageError:
            reasons[row["run"]] = row["status"]
        if row["status"] != "finished":
            told = [text for _, text in runs[-1].events if text.startswith(("failed", "stopped"))] if runs else []
            reasons[row["run"]] = told[-1] if told and row["run"] not in reasons else row["status"]
    return runs, reasons


def write_comparison(path: Path, runs: Sequence[RunSummary], failed: Mapping[str, str] | None = None) -> Path:
    """Write a page that ranks the runs by held-out loss; return its path. `failed` is run -> reason."""
    ranked = sorted(runs, key=lambda run: run.held_out[-1].mean if run.held_out else float("inf"))
    names = dict.fromkeys(name for run in runs for name in run.settings)
    differing = [
        name for name in names if len({run.settings.get(name) for run in runs}) > 1 and not name.endswith(".output_dir")
    ]
    judged = [run for run in ranked if run.held_out]
    specs = {"runs": charts.runs_chart([(run.name, run.held_out, run.base) for run in judged])} if judged else {}
    small = {f"run-{index}": charts.gain_chart(run.name, run.held_out, run.base) for index, run in enumerate(judged)}
    return write_page(
        path,
        "comparison.html",
        title=f"{len(runs) + len(set(failed or ()) - {run.name for run in runs})} runs of {path.resolve().parent.name}",
        best=_best(judged, path.parent),
        runs=ranked,
        differing=differing,
        effects=effects(judged, differing),
        small_ids=list(small),
        failed=failed or {},
        charts={**specs, **small},
    )


def effects(runs: Sequence[RunSummary], fields: Sequence[str]) -> list[dict[str, Any]]:
    """Return the mean gain over the base model at each value of each field, the field with the widest spread first."""
    found = []
    for field in fields:
        gains: dict[str, list[float]] = {}
        for run in runs:
            if run.verdict.gain is not None:
                gains.setdefault(run.settings.get(field, "-"), []).append(run.verdict.gain)
        means = {value: mean(values) for value, values in gains.items()}
        if len(means) > 1:
            found.append({"field": field, "means": means, "spread": max(means.values()) - min(means.values())})
    return sorted(found, key=lambda effect: (-effect["spread"], effect["field"]))


def _best(judged: Sequence[RunSummary], folder: Path) -> dict[str, str] | None:
    """Return name, verdict and command of the run with the lowest held-out loss, if it gained anything."""
    winners = [run for run in judged if (run.verdict.gain or 0) > (run.verdict.noise or 0)]
    if not winners:
        return None
    run = winners[0]
    config = shlex.quote(str(folder / run.name / "config.toml"))
    return {"name": run.name, "sentence": run.verdict.sentence, "command": f"precog sample {config}"}

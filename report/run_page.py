"""The page of a run: verdict, losses, held-out clips, previews, speed, settings; or of several runs side by side."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from report import charts
from report.page import number, write_page
from report.verdict import RULE, HeldOut, Verdict, judge
from shared.console import bytes_text
from shared.errors import UsageError
from shared.metrics_file import FILE_NAME, read_metrics

PAGE = "report.html"
MAX_WORST = 12
TONES = {"learning": "good", "overfitting": "bad", "worse than the base": "bad", "too noisy to say": "warn"}
GIB = 2**30

Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class WorstClip:
    """One held-out clip at the last evaluation."""

    name: str
    loss: float
    base: float | None
    gain: float | None


@dataclass(frozen=True, slots=True)
class RunSummary:
    """The numbers of a run's page, which are those of `--json`."""

    name: str
    verdict: Verdict
    steps_done: int
    num_steps: int | None
    clips_trained: int
    held_out: tuple[HeldOut, ...]
    base: HeldOut | None
    quantiles: tuple[float, ...]
    worst_clips: tuple[WorstClip, ...]
    figures: dict[str, str]
    settings: dict[str, str]
    provenance: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Return the object of `--json`; evaluations are given by their means."""
        body = asdict(self)
        body["held_out"] = [
            {"step": one.step, "loss": one.mean, "by_quantile": one.by_quantile} for one in self.held_out
        ]
        body["base"] = None if self.base is None else {"loss": self.base.mean, "by_quantile": self.base.by_quantile}
        return body


def read_run(run: Path) -> RunSummary:
    """Return the numbers of a run folder. Raise `UsageError` if it has no metrics."""
    return summarize(run, _lines(run))


def _lines(run: Path) -> list[dict[str, Any]]:
    lines = read_metrics(run)
    if not lines:
        raise UsageError(f"{run}: no {FILE_NAME} with a step in it; give the run folder of a training run")
    return lines


def write_comparison(path: Path, runs: Sequence[RunSummary]) -> Path:
    """Write a page with the runs' verdicts, held-out losses and the settings in which they differ; return its path."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    differing = [name for name in names if len({run.settings.get(name) for run in runs}) > 1]
    ranked = sorted(runs, key=lambda run: run.held_out[-1].mean if run.held_out else float("inf"))
    spec = charts.runs_chart([(run.name, run.held_out, run.base) for run in runs])
    return write_page(
        path,
        "comparison.html",
        title=f"{len(runs)} runs",
        runs=ranked,
        differing=differing,
        charts={"runs": spec} if any(run.held_out for run in runs) else {},
    )


def write_run_page(run: Path) -> Path:
    """Write `report.html` into a run folder and return its path. Raise `UsageError` if the folder has no metrics."""
    lines = _lines(run)
    summary = summarize(run, lines)
    specs = {"loss": charts.loss_chart(lines, summary.held_out, summary.base)}
    quantile_ids: list[str] = []
    if summary.base is not None and summary.held_out:
        for index, spec in enumerate(charts.quantile_charts(summary.held_out, summary.base, summary.quantiles)):
            specs[f"quantile-{index}"] = spec
            quantile_ids.append(f"quantile-{index}")
    small = {
        "seconds": charts.step_chart(lines, "seconds", "seconds per step"),
        "gradient": charts.step_chart(lines, "grad_norm", "gradient norm", rule=_clip_norm(run)),
        "rate": charts.step_chart(lines, "lr", "learning rate"),
        "memory": charts.step_chart(lines, "peak_memory_bytes", "peak memory, GiB", unit=GIB),
    }
    return write_page(
        run / PAGE,
        "run.html",
        title=f"Run {summary.name}",
        run=summary,
        tone=TONES.get(summary.verdict.kind, ""),
        rule=RULE,
        quantile_ids=quantile_ids,
        small_ids=list(small),
        previews=preview_gallery(run),
        charts={**specs, **small},
    )


def summarize(run: Path, lines: Sequence[Line]) -> RunSummary:
    """Return the numbers of a run from the lines of its metrics and its config."""
    config = _config(run)
    first = next((line for line in lines if "base_held_out_cells" in line), None)
    base = None if first is None else HeldOut(0, _cells(first["base_held_out_cells"]))
    held_out = tuple(
        HeldOut(line["step"], _cells(line["held_out_cells"])) for line in lines if "held_out_cells" in line
    )
    names = [] if first is None else first["held_out_clips"]
    return RunSummary(
        name=run.resolve().name,
        verdict=judge(base, held_out),
        steps_done=lines[-1]["step"],
        num_steps=config.get("train", {}).get("max_train_steps"),
        clips_trained=sum(line["samples"] for line in lines),
        held_out=held_out,
        base=base,
        quantiles=() if first is None else tuple(first["timestep_quantiles"]),
        worst_clips=_worst_clips(names, held_out, base),
        figures=_figures(lines, _clip_norm(run)),
        settings={f"{table}.{name}": str(value) for table, fields in config.items() for name, value in fields.items()},
        provenance={},
    )


def preview_gallery(run: Path) -> list[tuple[str, list[tuple[int, str]]]]:
    """Return (prompt, [(step, image path relative to the page)]) of the previews that can be shown."""
    return []


def _worst_clips(names: Sequence[str], held_out: Sequence[HeldOut], base: HeldOut | None) -> tuple[WorstClip, ...]:
    if not held_out:
        return ()
    before = (None,) * len(names) if base is None else base.by_clip
    clips = [
        WorstClip(name, loss, old, None if old is None else old - loss)
        for name, loss, old in zip(names, held_out[-1].by_clip, before, strict=True)
    ]
    return tuple(sorted(clips, key=lambda clip: -clip.loss)[:MAX_WORST])


def _figures(lines: Sequence[Line], clip_norm: float | None) -> dict[str, str]:
    seconds = sum(line["seconds"] for line in lines)
    clipped = None if clip_norm is None else sum(line["grad_norm"] > clip_norm for line in lines) / len(lines)
    return {
        "smoothed loss": number(lines[-1].get("ema_loss")),
        "seconds per step": number(seconds / len(lines)),
        "time in steps": str(timedelta(seconds=round(seconds))),
        "waiting for data": f"{sum(line['data_wait_seconds'] for line in lines) / max(seconds, 1e-9):.2%}",
        "gradients clipped": number(clipped, ".0%"),
        "peak memory": bytes_text(max(line["peak_memory_bytes"] for line in lines)),
    }


def _cells(rows: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in rows)


def _clip_norm(run: Path) -> float | None:
    found = _config(run).get("train", {}).get("max_grad_norm")
    return None if found is None else float(found)


def _config(run: Path) -> dict[str, dict[str, Any]]:
    path = run / "config.toml"
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}

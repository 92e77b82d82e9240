"""The page of a run: verdict, losses, held-out clips, previews, speed, settings, events; and loss.png."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from report import charts
from report.filmstrips import STRIP_FRAMES, STRIPS_PER_SHEET, cell_size, write_held_out
from report.page import number, write_page
from report.verdict import RULE, HeldOut, Verdict, judge
from shared.config import Config
from shared.console import bytes_text
from shared.errors import UsageError
from shared.run_folder import METRICS, PAGE, PREVIEWS, read_events, read_metrics

CURVE, STRIPS = "loss.png", "held-out"
MAX_WORST = 12
TONES = {"learning": "good", "overfitting": "bad", "worse than the base": "bad", "too noisy to say": "warn"}
GIB = 2**30

Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class WorstClip:
    """One held-out clip at the last evaluation."""

    number: int
    """Among the held-out clips, and in the filmstrips."""
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
    """Every field of the config."""
    defaults: dict[str, str]
    """Of the fields that differ from them."""
    provenance: dict[str, str]
    events: tuple[tuple[str, str], ...]
    """Time and description of starts, resumes, signals and ends."""
    gpu_hours: float | None
    """Time in steps on all processes; None without a GPU."""

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
        raise UsageError(f"{run}: no {METRICS} with a step in it; give the run folder of a training run")
    return lines


def write_run_page(run: Path) -> Path:
    """Write `report.html` and `loss.png` into a run folder; return the page's path.

    Raise `UsageError` if the folder has no metrics.
    """
    lines = _lines(run)
    summary = summarize(run, lines)
    specs = {"loss": charts.loss_chart(lines, summary.held_out, summary.base)}
    quantile_ids: list[str] = []
    if summary.base is not None and summary.held_out:
        for index, spec in enumerate(charts.quantile_charts(summary.held_out, summary.base, summary.quantiles)):
            specs[f"quantile-{index}"] = spec
            quantile_ids.append(f"quantile-{index}")
    charts.write_png(specs["loss"], run / CURVE)
    small = {
        "seconds": charts.step_chart(lines, "seconds", "seconds per step"),
        "waiting": charts.step_chart(lines, "data_wait_seconds", "seconds of it waiting for data"),
        "gradient": charts.step_chart(lines, "grad_norm", "gradient norm", rule=_clip_norm(run)),
        "rate": charts.step_chart(lines, "lr", "learning rate"),
        "memory": charts.step_chart(
            lines, "peak_memory_bytes", "peak memory, GiB", unit=GIB, rule=_planned_memory(read_events(run))
        ),
    }
    names: list[str] = next((line["held_out_clips"] for line in lines if "held_out_clips" in line), [])
    has_strips = write_held_out(run / STRIPS, run, names)
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
        strips=(*cell_size(len(names)), STRIP_FRAMES, STRIPS_PER_SHEET) if has_strips else None,
        strips_folder=STRIPS,
        charts={**specs, **small},
    )


def summarize(run: Path, lines: Sequence[Line]) -> RunSummary:
    """Return the numbers of a run from the lines of its metrics and its config."""
    config, events = _config(run), read_events(run)
    settings, defaults = _settings(config)
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
        settings=settings,
        defaults=defaults,
        provenance=_provenance(events),
        events=tuple((str(one.get("time", "-")), _event_text(one)) for one in events),
        gpu_hours=_gpu_hours(lines, events),
    )


def preview_gallery(run: Path) -> list[tuple[str, list[tuple[int, str]]]]:
    """Return (prompt, [(step, media path relative to the page)]) of the previews that can be shown."""
    found: dict[str, list[tuple[int, str]]] = {}
    for about in sorted((run / PREVIEWS).glob("step-*/[0-9]*.json")):
        media = next((path for kind in (".mp4", ".webp") if (path := about.with_suffix(kind)).exists()), None)
        if media is not None:
            facts = json.loads(about.read_text("utf-8"))
            found.setdefault(facts["prompt"], []).append((facts["step"], media.relative_to(run).as_posix()))
    return list(found.items())


def _worst_clips(names: Sequence[str], held_out: Sequence[HeldOut], base: HeldOut | None) -> tuple[WorstClip, ...]:
    if not held_out:
        return ()
    before = (None,) * len(names) if base is None else base.by_clip
    clips = [
        WorstClip(number, name, loss, old, None if old is None else old - loss)
        for number, (name, loss, old) in enumerate(zip(names, held_out[-1].by_clip, before, strict=True))
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


def _settings(config: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, str], dict[str, str]]:
    """Return all fields of the config, and the defaults of those that differ from them, as text."""
    settings, defaults = {}, {}
    for table, values in config.items():
        kinds: Any = getattr(Config.model_fields.get(table), "annotation", None)
        for name, value in values.items():
            settings[f"{table}.{name}"] = _text(value)
            if (field := getattr(kinds, "model_fields", {}).get(name)) is not None:
                default = (
                    None if field.is_required() else to_jsonable_python(field.get_default(call_default_factory=True))
                )
                if default != value:
                    defaults[f"{table}.{name}"] = "-" if default is None else _text(default)
    return settings, defaults


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _provenance(events: Sequence[Line]) -> dict[str, str]:
    """Return what the last start ran on."""
    start = next((one for one in reversed(events) if one.get("event") in ("started", "resumed")), {})
    names = ("model", "precision", "device", "processes", "view", "view_hash", "clips", "held_out_clips")
    facts = {name.replace("_", " "): str(start[name]) for name in names if name in start}
    return facts | {name: str(value) for name, value in start.get("versions", {}).items()}


def _event_text(event: Line) -> str:
    return " ".join(
        [str(event.get("event", "-"))]
        + ([f"at step {event['step']}"] if "step" in event else [])
        + ([f"({event['reason']})"] if "reason" in event else [])
    )


def _gpu_hours(lines: Sequence[Line], events: Sequence[Line]) -> float | None:
    start = next((one for one in reversed(events) if "device" in one), {"device": "CPU"})
    if str(start["device"]).startswith("CPU"):
        return None
    return float(sum(line["seconds"] for line in lines)) * int(start.get("processes", 1)) / 3600


def _planned_memory(events: Sequence[Line]) -> float | None:
    """Return the peak GiB of the memory plan's trial; None on a CPU, where plans are not tried."""
    trials = [one["trial"]["peak_memory_bytes"] for one in events if one.get("trial")]
    return trials[-1] / GIB if trials else None


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

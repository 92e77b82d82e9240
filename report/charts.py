"""The charts of the pages as Altair specifications; a page draws them offline with the bundled Vega-Lite."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np

from report.verdict import HeldOut, noisy_gains
from shared.atomic_files import replacing

MAX_POINTS = 1000
"""Of a line; longer ones are thinned."""
HEIGHT, SMALL_HEIGHT = 200, 120
"""Pixels of the plot; the page sets the width and lets charts wrap."""
COLORS = ["#2a78b5", "#c2571a", "#2e8540", "#8a4fa0", "#b8860b", "#5f6b76"]

Line = dict[str, Any]
Spec = dict[str, Any]


def thinned(lines: Sequence[Line]) -> list[Line]:
    """Return at most `MAX_POINTS` of the lines, evenly spread, with the last one."""
    stride = -(-len(lines) // MAX_POINTS)
    return [*lines[:-1:stride], lines[-1]] if len(lines) > MAX_POINTS else list(lines)


def loss_chart(lines: Sequence[Line], evaluations: Sequence[HeldOut], base: HeldOut | None) -> Spec:
    """Return the raw and smoothed training loss with the held-out loss, its margin and the base model's."""
    rows = [{"step": line["step"], "loss": line[name], "kind": kind} for line in thinned(lines) for name, kind in NAMES]
    held_out: list[Line] = [{"step": one.step, "loss": one.mean, "kind": "held out"} for one in evaluations]
    if base is not None and lines:
        ends = (lines[0]["step"], lines[-1]["step"])
        held_out += [{"step": step, "loss": base.mean, "kind": "base model, held out"} for step in ends]
        for row, (_, margin) in zip(held_out, noisy_gains(base, evaluations), strict=False):
            row |= {"low": row["loss"] - margin, "high": row["loss"] + margin} if margin < float("inf") else {}
    kinds = ["loss", "smoothed loss", "held out", "base model, held out"]
    legend = alt.Legend(orient="bottom", title=None, columns=2, symbolOpacity=1)
    color = alt.Color(
        "kind:N", scale=alt.Scale(domain=kinds, range=["#b9c4ce", COLORS[2], COLORS[0], COLORS[1]]), legend=legend
    )
    step = alt.X("step:Q", title="optimizer step")
    scale = alt.Scale(zero=False)
    training = _chart(rows).mark_line(strokeWidth=1.5)
    points = _chart(held_out)
    layers = [
        training.encode(x=step, y=alt.Y("loss:Q", title="velocity loss", scale=scale), color=color),
        points.mark_errorband(opacity=0.25).encode(x=step, y=alt.Y("low:Q", title=""), y2="high:Q", color=color)
        if any("low" in row for row in held_out)
        else None,
        points.mark_line(point=True).encode(x=step, y=alt.Y("loss:Q", title="", scale=scale), color=color),
    ]
    return _spec(alt.layer(*[layer for layer in layers if layer is not None]), "Loss")


NAMES = (("loss", "loss"), ("ema_loss", "smoothed loss"))


def quantile_charts(evaluations: Sequence[HeldOut], base: HeldOut, quantiles: Sequence[float]) -> list[Spec]:
    """Return one small chart for each timestep quantile: the held-out loss and the base model's."""
    charts = []
    for number, quantile in enumerate(quantiles):
        rows = [{"step": one.step, "loss": one.by_quantile[number], "kind": "held out"} for one in evaluations] + [
            {"step": step, "loss": base.by_quantile[number], "kind": "base model"}
            for step in (evaluations[0].step, evaluations[-1].step)
        ]
        scale = alt.Scale(domain=["held out", "base model"], range=COLORS)
        chart = _lines(rows, color=alt.Color("kind:N", scale=scale, legend=None))
        charts.append(_spec(chart, f"timesteps around {quantile:.0%}", SMALL_HEIGHT))
    return charts


def step_chart(lines: Sequence[Line], field: str, title: str, *, unit: float = 1.0, rule: float | None = None) -> Spec:
    """Return one quantity over the steps, divided by `unit`, with a dashed line at `rule`."""
    rows = [{"step": line["step"], "value": line[field] / unit} for line in thinned(lines) if field in line]
    chart = _chart(rows).mark_line(strokeWidth=1.5, color=COLORS[0])
    chart = chart.encode(x=alt.X("step:Q", title="optimizer step"), y=alt.Y("value:Q", title=None))
    return _spec(chart if rule is None else alt.layer(chart, _dashed({"value": rule}).encode(y="value:Q")), title)


def write_png(spec: Spec, path: Path) -> None:
    """Write a chart as a PNG on white, whole or not at all."""
    import vl_convert

    picture = vl_convert.vegalite_to_png({**spec, "width": 800, "height": 380, "background": "white"})
    with replacing(path) as pending:
        pending.write_bytes(picture)


def histogram_chart(values: Sequence[float], title: str, unit: str, *, rule: float | None = None) -> Spec | None:
    """Return how many values lie in each of up to 30 ranges, with a dashed line at `rule`; None without values."""
    if not values:
        return None
    counts, edges = np.histogram(values, bins=min(30, max(5, len(values) // 4)))
    rows = [
        {"low": float(low), "high": float(high), "count": int(count)}
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]
    bars = _chart(rows).mark_bar(color=COLORS[0])
    chart = bars.encode(
        x=alt.X("low:Q", title=None, bin="binned"),
        x2="high:Q",
        y=alt.Y("count:Q", title=unit, axis=alt.Axis(tickMinStep=1)),
    )
    if rule is not None and rule <= 1.5 * max(values):
        chart = alt.layer(chart, _dashed({"low": rule}).encode(x="low:Q"))
    return _spec(chart, title)


def runs_chart(runs: Iterable[tuple[str, Sequence[HeldOut], HeldOut | None]]) -> Spec:
    """Return the held-out loss of several runs over their steps, less the base model's where it is known."""
    rows = [
        {"step": one.step, "loss": one.mean - (base.mean if base else 0.0), "run": name}
        for name, evaluations, base in runs
        for one in evaluations
    ]
    legend = alt.Legend(orient="bottom", title=None, columns=2)
    color = alt.Color("run:N", scale=alt.Scale(range=COLORS), legend=legend)
    chart = _lines(rows, color=color, titles=("optimizer step", "held-out loss less the base model's"))
    return _spec(chart, "Held-out loss")


def gain_chart(title: str, evaluations: Sequence[HeldOut], base: HeldOut | None) -> Spec:
    """Return a small chart of one run: its gain over the base model with its margin, and a line at no gain."""
    gains = [] if base is None else noisy_gains(base, evaluations)
    rows: list[Line] = []
    for evaluation, (gain, margin) in zip(evaluations, gains, strict=False):
        band = {"low": gain - margin, "high": gain + margin} if margin < float("inf") else {}
        rows.append({"step": evaluation.step, "gain": gain, **band})
    x = alt.X("step:Q", title=None)
    layers = [
        _chart(rows).mark_errorband(opacity=0.25, color=COLORS[0]).encode(x=x, y=alt.Y("low:Q", title=""), y2="high:Q"),
        _chart(rows).mark_line(point=True, color=COLORS[0]).encode(x=x, y=alt.Y("gain:Q", title="")),
        _dashed({"gain": 0}).encode(y="gain:Q"),
    ]
    return _spec(alt.layer(*layers), title, SMALL_HEIGHT)


def _chart(rows: Sequence[Line]) -> Any:
    return alt.Chart(alt.Data(values=list(rows)))  # type: ignore[no-untyped-call]


def _lines(rows: Sequence[Line], *, color: Any, titles: tuple[str | None, str | None] = (None, None)) -> Any:
    """Return losses as lines with points over the steps; `titles` are those of the axes."""
    x, scale = alt.X("step:Q", title=titles[0]), alt.Scale(zero=False)
    return _chart(rows).mark_line(point=True).encode(x=x, y=alt.Y("loss:Q", title=titles[1], scale=scale), color=color)


def _dashed(at: Line) -> Any:
    """Return a dashed line at a value."""
    return _chart([at]).mark_rule(strokeDash=[4, 4], strokeWidth=2, color=COLORS[1])


def _spec(chart: Any, title: str, height: int = HEIGHT) -> Spec:
    sized = chart.properties(title=title, width="container", height=height, background="transparent")
    spec: Spec = sized.to_dict()
    return spec

"""The loss curve as a PNG: every step, the EMA loss, and the held-out losses. Drawn with Pillow."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from shared.atomic_files import replacing

FILE_NAME = "loss.png"
SIZE = (960, 540)
LEFT, TOP, RIGHT, BOTTOM = 84, 48, 936, 476
"""The plot's box in pixels."""
INK, GRID, RAW, SMOOTH, HELD_OUT, BASE = "#222222", "#e4e4e4", "#b9cde4", "#1f5fa8", "#c0392b", "#7f8c8d"

Point = tuple[float, float]


def draw_curve(lines: Sequence[dict[str, Any]], smooth: Sequence[float], path: Path) -> None:
    """One object of metrics.jsonl and one EMA loss per step, from step 1 on; held-out losses where they are."""
    assert lines
    loss = [(line["step"], line["loss"]) for line in lines]
    held_out = [(line["step"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]
    base = next((line["base_held_out_loss"] for line in lines if "base_held_out_loss" in line), None)
    shown = [value for _, value in loss + held_out if math.isfinite(value)] + ([] if base is None else [base])
    x_ticks, y_ticks = ticks(loss[0][0], max(loss[-1][0], loss[0][0] + 1)), ticks(min(shown), max(shown))
    x_range, y_range = (loss[0][0], max(loss[-1][0], loss[0][0] + 1)), (y_ticks[0], y_ticks[-1])

    def place(point: Point) -> Point:
        return (
            LEFT + (point[0] - x_range[0]) / (x_range[1] - x_range[0]) * (RIGHT - LEFT),
            BOTTOM - (point[1] - y_range[0]) / (y_range[1] - y_range[0]) * (BOTTOM - TOP),
        )

    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(14)
    for value in y_ticks:
        _, y = place((x_range[0], value))
        draw.line([(LEFT, y), (RIGHT, y)], fill=GRID)
        draw.text((LEFT - 8, y), f"{value:g}", fill=INK, font=font, anchor="rm")
    for value in x_ticks:
        if x_range[0] <= value <= x_range[1]:
            x, _ = place((value, y_range[0]))
            draw.line([(x, BOTTOM), (x, BOTTOM + 5)], fill=INK)
            draw.text((x, BOTTOM + 9), f"{value:g}", fill=INK, font=font, anchor="mt")
    draw.line([(LEFT, TOP), (LEFT, BOTTOM), (RIGHT, BOTTOM)], fill=INK)
    draw.text(((LEFT + RIGHT) / 2, SIZE[1] - 14), "optimizer step", fill=INK, font=font, anchor="mb")
    draw.text((LEFT, 8), "velocity loss", fill=INK, font=font)

    if base is not None:
        draw.line([place((x_range[0], base)), place((x_range[1], base))], fill=BASE, width=2)
    draw.line([place(point) for point in loss], fill=RAW, width=1)
    draw.line([place((step, value)) for (step, _), value in zip(loss, smooth, strict=True)], fill=SMOOTH, width=3)
    if len(held_out) > 1:
        draw.line([place(point) for point in held_out], fill=HELD_OUT, width=2)
    for point in held_out:
        x, y = place(point)
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=HELD_OUT)
    legend = [("each step", RAW), ("EMA loss", SMOOTH)]
    legend += [("held out", HELD_OUT)] if held_out else []
    legend += [("held out, without the adapter", BASE)] if base is not None else []
    x = float(RIGHT)
    for label, colour in reversed(legend):
        x -= draw.textlength(label, font=font)
        draw.text((x, 8), label, fill=INK, font=font)
        draw.line([(x - 32, 17), (x - 8, 17)], fill=colour, width=3)
        x -= 52
    with replacing(path) as pending:
        image.save(pending, format="PNG")


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers, steps of 1, 2 or 5 times a power of ten, whose ends enclose [low, high]."""
    span = max(high - low, 1e-3 * abs(high), 1e-9)
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]

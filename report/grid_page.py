"""The page of a folder of `precog sample`: prompts down, base model and LoRAs across, from the JSON files there."""

import json
from pathlib import Path
from typing import Any

from report.page import write_page
from shared.errors import UsageError

PAGE = "grid.html"
BASE = "base"
NEEDED = {"video", "label", "prompt", "seed", "distance", "saturation", "motion", "load", "recipe"}

Record = dict[str, Any]


def read_grid(folder: Path) -> tuple[list[str], list[dict[str, Record]], int]:
    """Return the labels, rows of {label: record}, and the number of records left out.

    Left out are videos with other settings than the base model's of their row. Raises `UsageError` without any row.
    """
    records = [record for path in sorted(folder.glob("*.json")) if (record := _record(path)) is not None]
    bases = {_row(record): record for record in records if record["label"] == BASE}
    rows: dict[tuple[str, int], dict[str, Record]] = {}
    for record in sorted(records, key=lambda one: (one["label"] != BASE, one["label"])):
        base = bases.get(_row(record))
        if base is not None and _settings(record) == _settings(base):
            rows.setdefault(_row(record), {})[record["label"]] = record | {
                "saturation_drift": _drift(record, base, "saturation"),
                "motion_drift": _drift(record, base, "motion"),
            }
    if not rows:
        raise UsageError(f"{folder}: no videos of `precog sample` found; give its sample.output_dir")
    labels = sorted({label for row in rows.values() for label in row}, key=lambda label: (label != BASE, label))
    return labels, list(rows.values()), len(records) - sum(map(len, rows.values()))


def write_grid_page(folder: Path) -> Path:
    """Write `grid.html` into the folder and return its path; raises as `read_grid`."""
    labels, rows, left_out = read_grid(folder)
    title = f"{len(rows)} prompts and seeds, {len(labels)} columns"
    return write_page(folder / PAGE, "grid.html", title=title, labels=labels, rows=rows, left_out=left_out, charts={})


def _record(path: Path) -> Record | None:
    """Read a record; None for a file of another kind, or without its video."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    complete = isinstance(found, dict) and found.keys() >= NEEDED and isinstance(found["recipe"], dict)
    return found if complete and path.with_suffix(".mp4").is_file() else None


def _row(record: Record) -> tuple[str, int]:
    return record["prompt"], record["seed"]


def _settings(record: Record) -> Record:
    return {name: value for name, value in record["recipe"].items() if name != "loras"}


def _drift(record: Record, base: Record, name: str) -> float | None:
    """Return the relative change against the base model; None if that has none of the quantity."""
    return record[name] / base[name] - 1 if base[name] else None

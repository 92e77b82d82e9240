"""Results of a benchmark: a JSON with raw samples, a table, and the machine and versions they were taken with."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"


def circumstances(device_type: str = "cpu") -> dict[str, Any]:
    """Return machine, versions, date and command; call at the start, as the load is part of them."""
    import torch  # here, as decoding processes import benchmarks again and must not load it

    from precompute.recipes import environment

    found = environment(torch.device(device_type))
    versions = found["versions"]
    assert isinstance(versions, Mapping)
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return {
        "device": found["device"],
        "nvidia_smi": _nvidia_smi() if device_type == "cuda" else "",
        "processor": ", ".join(sorted({line.partition(":")[2].strip() for line in lines if "model name" in line})),
        "cores": os.cpu_count(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "versions": {**dict(versions), "peft": version("peft")},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }


def _nvidia_smi() -> str:
    """Return driver, clocks and power limit."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit", "--format=csv"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def short_name(device: Any) -> str:
    """Return a torch device's name for file names, such as "nvidia-h100-80gb-hbm3"."""
    import torch

    return re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def describe(found: dict[str, Any]) -> str:
    """Return `circumstances` as the last line of a table."""
    names = ("python", "torch", "diffusers", "av")
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in names)
    device = found["device"]["name"] if found["nvidia_smi"] else found["processor"]
    machine = f"{device}, {found['cores']} cores, load {found['load_at_start']} at the start"
    return f"{machine}; {versions}; {found['date']}; `{found['command']}`\n"


def interval(values: Sequence[float] | Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the median and its 95 % bootstrap interval; in [starts][turns], starts are drawn first, then turns."""
    found = np.atleast_2d(np.asarray(values))
    starts, turns = found.shape
    draw = np.random.default_rng(0)
    medians = [
        np.median(found[draw.integers(starts, size=(starts, 1)), draw.integers(turns, size=(starts, turns))])
        for _ in range(10_000)
    ]
    low, high = np.percentile(medians, [2.5, 97.5])
    return {"median": float(np.median(found)), "low": float(low), "high": float(high)}


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; floats have three digits."""
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def write(name: str, found: dict[str, Any], text: str) -> None:
    """Write `found` to <name>.json and `text` to <name>.md."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")

"""Stage 1 on a CUDA GPU with encoders of the published size: clips and prompts per second, waiting, memory.

    python -m bench.gpu_precompute              # writes bench/results/<gpu>-precompute.json and .md
    python -m bench.gpu_precompute --dry-run    # every arm once with tiny encoders on the CPU; writes nothing

Weights are random. Each pass of stage 1 runs alone, as in `precog precompute`, into an empty cache, after a warm-up on
two clips. Arms take turns; the first runs twice, as A/A control. An arm that fails is reported; the other arms
continue. Exits with 2 without CUDA, and with 1 after a failed arm.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import record

if TYPE_CHECKING:  # decoding processes import this file again, and must not load torch
    from bench.encoding import Scene

Rows = dict[str, list[dict[str, float]]]
TARGET = "Target at 49x480x720 on an H100: 2 clips per second."
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "untiled": ("clips", {}),
    "untiled again": ("clips", {}),
    "tiled": ("clips", {"enable_tiling": True}),
    "channels last": ("clips", {"channels_last": True}),
    "compiled": ("clips", {"compile_vae": True}),
    "two at a time": ("clips", {"vae_batch_size": 2}),
    "fp32": ("clips", {"vae_dtype": "fp32"}),
    "tf32": ("clips", {"vae_dtype": "tf32"}),
    "T5": ("prompts", {}),
    "T5 offloaded": ("prompts", {"text_offload": True}),
}
"""Arm -> the pass that it times, and its fields of [precompute]."""


def run_arms(scene: "Scene", rounds: int, limit_seconds: float) -> tuple[Rows, dict[str, str]]:
    """Return each arm's rows and the failures; no arm begins after the limit."""
    from bench.encoding import measure

    started = time.monotonic()
    rows: Rows = {}
    failures: dict[str, str] = {}
    for number in range(rounds):
        for name, (kind, settings) in list(SETTINGS.items())[:: -1 if number % 2 else 1]:
            if name in failures or time.monotonic() - started > limit_seconds:
                continue
            try:
                row = measure(scene, kind, settings)
            except Exception as error:  # the other arms continue
                failures[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                traceback.print_exc()
                continue
            rows.setdefault(name, []).append(row)
            print(name, json.dumps({column: round(value, 3) for column, value in row.items()}), flush=True)
    return rows, failures


def as_markdown(found: dict[str, Any]) -> str:
    """Return the medians by arm."""
    columns = ("clips_per_second", "waited_for_decode", "waited_for_write", "prompts_per_second", "peak_gib")
    rows: list[list[object]] = []
    for name, measured in found["arms"].items():
        medians = [
            statistics.median(row[column] for row in measured if column in row) if column in measured[0] else ""
            for column in columns
        ]
        rows.append([name, len(measured), *medians])
    rows += [[name, f"failed: {reason}", *[""] * len(columns)] for name, reason in found["failures"].items()]
    card = found["circumstances"]["device"]["name"]
    return "\n".join(
        [
            f"Stage 1 on {card}, clips of {found['bucket']} in bf16, random weights:\n",
            record.table(["", "rounds", *(column.replace("_", " ") for column in columns)], rows),
            f"{TARGET}\n",
            record.describe(found["circumstances"]),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu_precompute")
    parser.add_argument("--clips", type=int, default=16, help="clips of one timed pass")
    parser.add_argument("--rounds", type=int, default=3, help="at most")
    parser.add_argument("--limit-seconds", type=float, default=420, help="begin no arm later than this")
    parser.add_argument("--dry-run", action="store_true", help="every arm once, tiny, on the CPU")
    given = parser.parse_args(arguments)
    import torch

    if not given.dry_run and not torch.cuda.is_available():
        print("bench.gpu_precompute CUDA not found; run with --dry-run on a CPU", file=sys.stderr)
        return 2
    from bench.encoding import published_scene, tiny_scene
    from shared.console import quiet_libraries

    quiet_libraries()
    found: dict[str, Any] = {"circumstances": record.circumstances("cpu" if given.dry_run else "cuda")}
    with tempfile.TemporaryDirectory() as folder:
        scene = tiny_scene(Path(folder)) if given.dry_run else published_scene(Path(folder), given.clips)
        found["bucket"] = str(scene.bucket)
        found["arms"], found["failures"] = run_arms(scene, 1 if given.dry_run else given.rounds, given.limit_seconds)
    text = as_markdown(found)
    print(text)
    if not given.dry_run:
        record.write(f"{record.short_name(scene.device)}-precompute", found, text)
    return int(bool(found["failures"]))


if __name__ == "__main__":
    sys.exit(main())

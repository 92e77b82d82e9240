"""Stage 1 on a CUDA GPU with encoders of the published size: clips and prompts per second, who waited, memory.

    python -m bench.gpu_precompute              # writes bench/results/precompute-<gpu>.json and .md
    python -m bench.gpu_precompute --dry-run    # every arm once with tiny encoders on the CPU; writes nothing

Weights are random, which costs what trained ones do. Each pass of stage 1 runs alone, as `precog precompute` runs it,
into an empty cache, after a warm-up on two clips. Arms take turns; the first comes twice, as A/A control. An arm that
fails is said to have, the others go on. Without CUDA it exits with 2, with a failed arm with 1.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # decoding processes import this file again, and must not load torch
    from bench.stage_1 import Scene

Rows = dict[str, list[dict[str, float]]]
TARGET = "Target at 49x480x720 on an H100: 2 clips per second."
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "untiled": ("clips", {}),
    "untiled again": ("clips", {}),
    "tiled": ("clips", {"enable_tiling": True}),
    "channels last": ("clips", {"channels_last": True}),
    "compiled": ("clips", {"compile_vae": True}),
    "two at a time": ("clips", {"vae_batch_size": 2}),
    "T5": ("prompts", {}),
    "T5 in int8": ("prompts", {"text_quantization": "int8"}),
}
"""Arm -> the pass that it times, and its fields of [precompute]."""


def run_arms(scene: "Scene", rounds: int, limit_seconds: float) -> tuple[Rows, dict[str, str]]:
    """Rows of each arm by name, and why an arm failed; no arm begins after the limit."""
    from bench.stage_1 import measure

    started = time.monotonic()
    rows: Rows = {}
    failures: dict[str, str] = {}
    for number in range(rounds):
        for name, (kind, settings) in list(SETTINGS.items())[:: -1 if number % 2 else 1]:
            if name in failures or time.monotonic() - started > limit_seconds:
                continue
            try:
                row = measure(scene, kind, settings)
            except Exception as error:  # whatever it is, the other arms are worth their time
                failures[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                traceback.print_exc()
                continue
            rows.setdefault(name, []).append(row)
            print(name, json.dumps({column: round(value, 3) for column, value in row.items()}), flush=True)
    return rows, failures


def as_markdown(record: dict[str, Any]) -> str:
    """Medians by arm."""
    columns = ("clips_per_second", "waited_for_decode", "waited_for_write", "prompts_per_second", "peak_gib")
    lines = [
        f"Stage 1 on {record['gpu']}: clips of {record['bucket']} in bf16, random weights; medians.",
        "",
        "| | rounds | " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for name, rows in record["arms"].items():
        medians = {column: statistics.median(row[column] for row in rows) for column in columns if column in rows[0]}
        cells = [f"{medians[column]:.2f}" if column in medians else "" for column in columns]
        lines.append(f"| {name} | {len(rows)} | " + " | ".join(cells) + " |")
    lines += [f"| {name} | failed: {reason} |" for name, reason in record["failures"].items()]
    return "\n".join([*lines, "", TARGET, "", f"{record['date']}; `{record['command']}`", ""])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu_precompute")
    parser.add_argument("--clips", type=int, default=16, help="clips of one timed pass")
    parser.add_argument("--rounds", type=int, default=3, help="at most")
    parser.add_argument("--limit-seconds", type=float, default=420, help="begin no arm later than this")
    parser.add_argument("--dry-run", action="store_true", help="every arm once, tiny, on the CPU")
    given = parser.parse_args(arguments)
    import torch

    if not given.dry_run and not torch.cuda.is_available():
        print("bench.gpu_precompute needs a CUDA GPU; none is here (--dry-run runs without)", file=sys.stderr)
        return 2
    from bench.precompute import RESULTS
    from bench.stage_1 import published_scene, tiny_scene
    from precompute.provenance import environment

    with tempfile.TemporaryDirectory() as folder:
        scene = tiny_scene(Path(folder)) if given.dry_run else published_scene(Path(folder), given.clips)
        rows, failures = run_arms(scene, 1 if given.dry_run else given.rounds, given.limit_seconds)
    gpu = "a CPU" if given.dry_run else torch.cuda.get_device_name()
    record = {
        "gpu": gpu,
        "environment": environment(scene.device),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["python -m bench.gpu_precompute", *(sys.argv[1:] if arguments is None else arguments)]),
        "bucket": str(scene.bucket),
        "arms": rows,
        "failures": failures,
    }
    text = as_markdown(record)
    print(text)
    if not given.dry_run:
        path = RESULTS / f"precompute-{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"
        RESULTS.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(text, encoding="utf-8")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())

"""Stage 1 on the CPU with the tiny VAE: decode, encode and write overlapped against one after the other, in one run;
host memory with 64 and with 512 clips.

    python bench/precompute.py            # writes bench/results/precompute-cpu.json and .md
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any
from unittest.mock import patch

import av
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "bench" / "results"
SOURCE = (720, 1280, 97)
"""Height, width and frames of a source; decoding one costs about what encoding its bucket does."""
BUCKET = (9, 64, 96)


def write_video(path: Path, seed: int, height: int, width: int, frames: int) -> None:
    """A moving picture with enough detail that decoding it is work."""
    draws = np.random.default_rng(seed)
    picture = draws.integers(0, 256, (height // 4, width // 4 + frames, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("libx264", rate=12, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            view = np.ascontiguousarray(picture[:, 4 * index : 4 * index + width])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        out.mux(stream.encode(None))


def write_corpus(folder: Path, count: int, height: int, width: int, frames: int) -> None:
    folder.mkdir()
    for number in range(count):
        write_video(folder / f"{number:04}.mp4", number, height, width, frames)
    (folder / "prompts.txt").write_text("\n".join(f"clip {number}" for number in range(count)))
    (folder / "videos.txt").write_text("\n".join(f"{number:04}.mp4" for number in range(count)))


def make_config(root: Path, cache: Path, bucket: tuple[int, int, int], fps: int) -> Any:
    from shared.config import Config

    return Config.model_validate(
        {
            "model": {"pretrained_model_name_or_path": str(ROOT / "demo" / "tiny")},
            "data": {
                "name": "bench",
                "instance_data_root": root,
                "caption_column": "prompts.txt",
                "video_column": "videos.txt",
                "fps": fps,
                "frame_buckets": [bucket[0]],
                "resolution_buckets": [bucket[1:]],
            },
            "precompute": {"cache": str(cache), "device": "cpu", "decode_workers": 1, "clips_per_shard": 8},
            "train": {"output_dir": "runs/bench"},
        }
    )


class InTurn(Executor):
    """Runs what is submitted at once, in the caller's thread."""

    def __init__(self, *_: object) -> None:
        pass

    def submit(self, call: Any, /, *arguments: Any, **named: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(call(*arguments, **named))
        return future


def in_turn(items: Iterator[Any], *_: object) -> Iterator[Any]:
    return items


def decode_in_turn(pool: Any, jobs: Iterator[Any]) -> Iterator[Any]:
    """One clip asked for, decoded and handed over before the next is asked for."""
    from precompute.pool import DecodePool

    for job in jobs:
        yield from DecodePool._run(pool, [job])


def one_run(root: Path, bucket: tuple[int, int, int], *, overlapped: bool) -> dict[str, float]:
    """Seconds of the VAE pass, from its first decode to its last shard."""
    from precompute import latents
    from precompute.plan import Part
    from precompute.pool import DecodePool
    from precompute.run import precompute
    from shared.preemption import StopSignal

    with tempfile.TemporaryDirectory() as scratch:
        config = make_config(root, Path(scratch) / "cache", bucket, fps=1)
        if overlapped:
            report = precompute(config, Part(), StopSignal())
        else:
            with (
                patch.object(latents, "ahead", in_turn),
                patch.object(latents, "ThreadPoolExecutor", InTurn),
                patch.object(DecodePool, "decode_all", decode_in_turn),
            ):
                report = precompute(config, Part(), StopSignal())
    seconds = report.seconds
    return {
        "pass": seconds["video_pass"],
        "decode": seconds["decode"],
        "encode": seconds["encode_latents"],
        "write": seconds["write"],
        "waited_for_decode": seconds["wait_for_decode"],
    }


def peak_memory(count: int) -> int:
    """Bytes of resident memory at the peak of a fresh process that encodes `count` clips, its decoders not counted."""
    command = [sys.executable, __file__, "--memory", str(count)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ})
    return int(answer.stdout.split()[-1])


def measure_memory(count: int) -> None:
    import resource

    import torch

    from precompute.plan import Part
    from precompute.run import precompute
    from shared.preemption import StopSignal

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "clips"
        write_corpus(root, count, 96, 160, 33)
        precompute(make_config(root, Path(scratch) / "cache", (9, 32, 48), fps=3), Part(), StopSignal())
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def measure_overlap(clips: int, rounds: int) -> dict[str, Any]:
    """Interleaved rounds of one after the other, overlapped, and overlapped once more: the last two tell the noise."""
    runs: dict[str, list[dict[str, float]]] = {"one after the other": [], "overlapped": [], "overlapped again": []}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "clips"
        write_corpus(root, clips, *SOURCE)
        one_run(root, BUCKET, overlapped=True)
        for number in range(rounds):
            names = list(runs)[number % 3 :] + list(runs)[: number % 3]
            for name in names:
                runs[name].append(one_run(root, BUCKET, overlapped=name != "one after the other"))
                runs[name][-1]["load"] = os.getloadavg()[0]
    turn, first, second = ([run["pass"] for run in found] for found in runs.values())
    speedups = [a / statistics.mean((b, c)) for a, b, c in zip(turn, first, second, strict=True)]
    medians = {
        name: {key: round(statistics.median(run[key] for run in found), 3) for key in found[0]}
        for name, found in runs.items()
    }
    alone = medians["one after the other"]
    return {
        "clips": clips,
        "source": "x".join(map(str, SOURCE)),
        "bucket": "x".join(map(str, BUCKET)),
        "rounds": rounds,
        "median_seconds": medians,
        "speedup": [round(statistics.median(speedups), 2), round(min(speedups), 2), round(max(speedups), 2)],
        "same_against_same": [round(a / b, 2) for a, b in zip(first, second, strict=True)],
        "runs": runs,
        "bound": round(alone["pass"] / max(alone["waited_for_decode"], alone["encode"]), 2),
    }


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import platform
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return {
        "processor": ", ".join(sorted(names)),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "av")},
        "load_at_start": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["python", "bench/precompute.py", *sys.argv[1:]]),
    }


def as_markdown(found: dict[str, Any]) -> str:
    overlap, host, memory = found["overlap"], found["machine"], found["peak_memory_mib"]
    median, least, most = overlap["speedup"]
    columns = ("pass", "decode", "encode", "write", "waited_for_decode", "load")
    rows = [
        f"| {name} | " + " | ".join(f"{row[column]:.2f}" for column in columns) + " |"
        for name, row in overlap["median_seconds"].items()
    ]
    versions = ", ".join(f"{name} {number}" for name, number in host["versions"].items())
    return "\n".join(
        [
            f"Stage 1 on the CPU with the tiny VAE: {overlap['clips']} clips of {overlap['source']} (height, width, "
            f"frames) to {overlap['bucket']}; one encoder thread, one decoder; median seconds of "
            f"{overlap['rounds']} interleaved rounds.",
            "",
            f"| | {' | '.join(column.replace('_', ' ') for column in columns)} |",
            "|---" * (1 + len(columns)) + "|",
            *rows,
            "",
            f"Overlapped is {median}x as fast ({least} to {most} by round); the same against itself "
            f"{min(overlap['same_against_same'])} to {max(overlap['same_against_same'])}. With everything but the "
            f"slower of decode and encode for free it would be {overlap['bound']}x.",
            "",
            "Peak host memory of a whole run, its decoders not counted: "
            + ", ".join(f"{size} MiB with {count} clips" for count, size in memory.items())
            + ".",
            "",
            f"{host['processor']}, {host['cores']} cores, load {host['load_at_start']} at the start; "
            f"Python {host['python']}, {versions}; {host['date']}; `{host['command']}`.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=12, help="clips of the overlap measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        measure_memory(arguments.memory)
        return
    import torch

    torch.set_num_threads(1)
    host = machine()
    found = {
        "machine": host,
        "overlap": measure_overlap(arguments.clips, arguments.rounds),
        "peak_memory_mib": {str(count): round(peak_memory(count) / 2**20) for count in (64, 512)},
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "precompute-cpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "precompute-cpu.md").write_text(as_markdown(found))
    print(as_markdown(found))


if __name__ == "__main__":
    main()

"""Stage 1 on the CPU with the tiny VAE: decode, encode and write overlapped against one after the other, in one run;
host memory with 64 and with 512 clips.

    python bench/precompute.py            # writes bench/results/precompute.json and .md
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
ROUNDS = 3


def write_video(path: Path, seed: int, height: int, width: int, frames: int) -> None:
    """A moving picture with enough detail that decoding it is work."""
    draws = np.random.default_rng(seed)
    picture = draws.integers(0, 256, (height // 8, width // 8 + frames, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            view = np.ascontiguousarray(picture[:, 8 * index : 8 * index + width])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        out.mux(stream.encode(None))


def write_corpus(folder: Path, count: int, height: int, width: int, frames: int) -> None:
    folder.mkdir()
    for number in range(count):
        write_video(folder / f"{number:04}.mp4", number, height, width, frames)
    (folder / "prompts.txt").write_text("\n".join(f"clip {number}" for number in range(count)))
    (folder / "videos.txt").write_text("\n".join(f"{number:04}.mp4" for number in range(count)))


def make_config(root: Path, cache: Path, bucket: tuple[int, int, int]) -> Any:
    from shared.config import Config

    return Config.model_validate(
        {
            "model": {"pretrained_model_name_or_path": str(ROOT / "demo" / "tiny")},
            "data": {
                "name": "bench",
                "instance_data_root": root,
                "caption_column": "prompts.txt",
                "video_column": "videos.txt",
                "fps": 2,
                "frame_buckets": [bucket[0]],
                "resolution_buckets": [bucket[1:]],
            },
            "precompute": {"cache": str(cache), "device": "cpu", "decode_workers": 2, "clips_per_shard": 8},
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
        config = make_config(root, Path(scratch) / "cache", bucket)
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
        precompute(make_config(root, Path(scratch) / "cache", (9, 32, 48)), Part(), StopSignal())
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=24, help="clips of the overlap measurement")
    parser.add_argument("--memory", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        measure_memory(arguments.memory)
        return
    import torch

    torch.set_num_threads(1)
    bucket, source = (9, 32, 48), (288, 512, 41)
    runs: dict[str, list[dict[str, float]]] = {"one after the other": [], "overlapped": []}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "clips"
        write_corpus(root, arguments.clips, *source)
        one_run(root, bucket, overlapped=True)
        for _ in range(ROUNDS):
            for name, found in runs.items():
                found.append(one_run(root, bucket, overlapped=name == "overlapped"))
    medians = {
        name: {key: round(statistics.median(run[key] for run in found), 3) for key in found[0]}
        for name, found in runs.items()
    }
    memory = {count: peak_memory(count) for count in (64, 512)}
    result = {
        "clips": arguments.clips,
        "source": "x".join(map(str, source)),
        "bucket": "x".join(map(str, bucket)),
        "rounds": ROUNDS,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "seconds": medians,
        "speedup": round(medians["one after the other"]["pass"] / medians["overlapped"]["pass"], 2),
        "peak_memory_mib": {str(count): round(size / 2**20) for count, size in memory.items()},
        "time": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    lines = ["| | pass | decode (sum) | encode | write |", "|---|---|---|---|---|"]
    for name, row in medians.items():
        lines.append(f"| {name}, s | {row['pass']} | {row['decode']} | {row['encode']} | {row['write']} |")
    lines += ["", f"Overlapped is {result['speedup']}x as fast. Peak host memory: {result['peak_memory_mib']} MiB."]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "precompute.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "precompute.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

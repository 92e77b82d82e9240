"""Stage 1 on the CPU with the tiny VAE: decode, encode and write overlapped against one after the other, in one run;
host memory with 64 and with 512 clips: `make bench-precompute`.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from bench import record
from bench.media import write_corpus

if TYPE_CHECKING:  # decoding processes import this file again, and must not load torch
    from shared.config import Config

ROOT = Path(__file__).parents[1]
SOURCE = (720, 1280, 97)
"""Height, width and frames of a source; decoding one costs about what encoding its bucket does."""
BUCKET = (9, 64, 96)
ARMS = ("one after the other", "overlapped", "overlapped again")


def make_config(root: Path, cache: Path, bucket: tuple[int, int, int], fps: int) -> "Config":
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


def decode_in_turn(pool: Any, jobs: Iterator[Any], ahead: int = 0) -> Iterator[Any]:
    """One clip asked for, decoded and handed over before the next is asked for."""
    from precompute.video.pool import DecodePool

    for job in jobs:
        yield from DecodePool._run(pool, [job], 0)


def one_run(root: Path, bucket: tuple[int, int, int], *, overlapped: bool) -> dict[str, float]:
    """Seconds of the VAE pass, from its first decode to its last shard."""
    from precompute import latents
    from precompute.run import precompute
    from precompute.video.pool import DecodePool

    with tempfile.TemporaryDirectory() as scratch:
        config = make_config(root, Path(scratch) / "cache", bucket, fps=1)
        if overlapped:
            report = precompute(config)
        else:
            with (
                patch.object(latents, "ThreadPoolExecutor", InTurn),
                patch.object(DecodePool, "decode_all", decode_in_turn),
            ):
                report = precompute(config)
    seconds = report.seconds
    return {
        "pass": seconds["video_pass"],
        "decode": seconds["decode"],
        "encode": seconds["encode_latents"],
        "write": seconds["write"],
        "waited for decode": seconds["wait_for_decode"],
        "load": os.getloadavg()[0],
    }


def measure_overlap(clips: int, rounds: int) -> dict[str, Any]:
    """Interleaved rounds of one after the other, overlapped, and overlapped once more: the last two tell the noise."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "clips"
        write_corpus(root, clips, *SOURCE)
        one_run(root, BUCKET, overlapped=True)
        for number in range(rounds):
            for name in [*ARMS[number % 3 :], *ARMS[: number % 3]]:
                runs[name].append(one_run(root, BUCKET, overlapped=name != ARMS[0]))
    turn, first, second = ([run["pass"] for run in found] for found in runs.values())
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }
    alone = medians[ARMS[0]]
    return {
        "clips": clips,
        "source": "x".join(map(str, SOURCE)),
        "bucket": "x".join(map(str, BUCKET)),
        "rounds": rounds,
        "median_seconds": medians,
        "speedup": [a / statistics.mean((b, c)) for a, b, c in zip(turn, first, second, strict=True)],
        "same_against_same": [a / b for a, b in zip(first, second, strict=True)],
        "bound": alone["pass"] / max(alone["waited for decode"], alone["encode"]),
        "runs": runs,
    }


def peak_memory(count: int) -> int:
    """Bytes of resident memory at the peak of a fresh process that encodes `count` clips, its decoders not counted."""
    command = [sys.executable, "-m", "bench.cpu_precompute", "--memory", str(count)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return int(answer.stdout.split()[-1])


def measure_memory(count: int) -> int:
    """The same of this process."""
    import resource

    from precompute.run import precompute

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "clips"
        write_corpus(root, count, 96, 160, 33)
        precompute(make_config(root, Path(scratch) / "cache", (9, 32, 48), fps=3))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def as_markdown(found: dict[str, Any]) -> str:
    overlap, speedup, same = found["overlap"], found["overlap"]["speedup"], found["overlap"]["same_against_same"]
    memory = ", ".join(f"{size / 2**20:.0f} MiB with {count} clips" for count, size in found["peak_bytes"].items())
    columns = overlap["median_seconds"][ARMS[0]]
    lines = [
        f"Stage 1 on the CPU with the tiny VAE: {overlap['clips']} clips of {overlap['source']} (height, width, "
        f"frames) to {overlap['bucket']}; one encoder thread, one decoder; median seconds of "
        f"{overlap['rounds']} interleaved rounds.\n",
        record.table(["", *columns], [[name, *row.values()] for name, row in overlap["median_seconds"].items()]),
        f"Overlapped is {statistics.median(speedup):.2f}x as fast ({min(speedup):.2f} to {max(speedup):.2f} by round); "
        f"the same against itself {min(same):.2f} to {max(same):.2f}. With everything but the slower of decode and "
        f"encode for free it would be {overlap['bound']:.2f}x.\n",
        f"Peak host memory of a whole run, its decoders not counted: {memory}.\n",
        record.describe(found["circumstances"]),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=12, help="clips of the overlap measurement")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--memory", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    if arguments.memory:
        print(measure_memory(arguments.memory))
        return
    found = {
        "circumstances": record.circumstances(),
        "overlap": measure_overlap(arguments.clips, arguments.rounds),
        "peak_bytes": {str(count): peak_memory(count) for count in (64, 512)},
    }
    text = as_markdown(found)
    record.write("cpu-precompute", found, text)
    print(text)


if __name__ == "__main__":
    main()

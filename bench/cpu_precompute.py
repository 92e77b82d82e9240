"""Stage 1 on the CPU with the tiny VAE: `make bench-precompute`.

Compares the seconds of the VAE pass with the sum of its parts (decode, encode, write), and host memory with 64 and 512
clips.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import record
from bench.media import write_corpus

if TYPE_CHECKING:  # decoding processes import this file again, and must not load torch
    from shared.config import Config

ROOT = Path(__file__).parents[1]
SOURCE = (720, 1280, 97)
"""Height, width and frames of a source; decoding one costs about as much as encoding its bucket."""
BUCKET = (9, 64, 96)


def make_config(root: Path, cache: Path, bucket: tuple[int, int, int], fps: int) -> "Config":
    from shared.config import Config

    return Config.model_validate(
        {
            "model": {"pretrained_model_name_or_path": str(ROOT / "demo" / "mini")},
            "data": {
                "name": "bench",
                "instance_data_root": root,
                "caption_column": "prompts.txt",
                "video_column": "videos.txt",
                "fps": fps,
                "frame_buckets": [bucket[0]],
                "allow_uneven_frame_buckets": True,
                "resolution_buckets": [bucket[1:]],
            },
            "precompute": {"cache": str(cache), "device": "cpu", "decode_workers": 1, "clips_per_shard": 8},
            "train": {"output_dir": "runs/bench"},
        }
    )


def one_run(root: Path) -> dict[str, float]:
    """Return the seconds of the VAE pass, from the first decode to the last shard, and of its parts."""
    from precompute.run import precompute

    with tempfile.TemporaryDirectory() as scratch:
        config = make_config(root, Path(scratch) / "cache", BUCKET, fps=1)
        report = precompute(config)
    seconds = report.seconds
    parts = {"decode": seconds["decode"], "encode": seconds["encode_latents"], "write": seconds["write"]}
    overlap = {"pass": seconds["video_pass"], "waited for decode": seconds["wait_for_decode"]}
    return {
        **overlap,
        **parts,
        "sum of parts / pass": sum(parts.values()) / overlap["pass"],
        "load": os.getloadavg()[0],
    }


def measure_overlap(clips: int, rounds: int) -> dict[str, Any]:
    """Run the pass `rounds` times after a warm-up; return medians and every run."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "clips"
        write_corpus(root, clips, *SOURCE)
        one_run(root)
        runs = [one_run(root) for _ in range(rounds)]
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    sizes = {"source": "x".join(map(str, SOURCE)), "bucket": "x".join(map(str, BUCKET))}
    return {"clips": clips, "rounds": rounds, **sizes, "median_seconds": medians, "runs": runs}


def peak_memory(count: int) -> int:
    """Return the peak resident bytes of a new process that encodes `count` clips, without its decoders."""
    command = [sys.executable, "-m", "bench.cpu_precompute", "--memory", str(count)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return int(answer.stdout.split()[-1])


def measure_memory(count: int) -> int:
    """Encode `count` clips in this process and return its peak resident bytes."""
    import resource

    from precompute.run import precompute

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "clips"
        write_corpus(root, count, 96, 160, 33)
        precompute(make_config(root, Path(scratch) / "cache", (9, 32, 48), fps=3))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def as_markdown(found: dict[str, Any]) -> str:
    """Return the table."""
    overlap = found["overlap"]
    memory = ", ".join(f"{size / 2**20:.0f} MiB with {count} clips" for count, size in found["peak_bytes"].items())
    lines = [
        f"Stage 1 on the CPU with the tiny VAE: {overlap['clips']} clips of {overlap['source']} (height, width, "
        f"frames) to {overlap['bucket']}; one encoder thread, one decoder; median seconds of "
        f"{overlap['rounds']} rounds.\n",
        record.table([*overlap["median_seconds"]], [[*overlap["median_seconds"].values()]]),
        f"Peak host memory of a whole run, without its decoders: {memory}.\n",
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

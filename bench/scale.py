"""Costs that grow with the data set, and costs of one real-size sample, in CPU seconds: `make bench-scale`.

Rows of stage 1 are files of their own, but copies of one video: nothing here decodes or encodes a data set.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench import record
from bench.media import write_video

ROOT = Path(__file__).parents[1]
SIDE, FRAMES = 32, 5
CAPTION = (
    "clip {number}: a quiet street in the rain at dusk, a cyclist with a yellow coat passes two parked cars while the "
    "camera pans slowly to the left and the lights of shop number {number} are mirrored on the wet stones"
)
BUCKET = (49, 480, 720)
SAMPLES = 64
COMMANDS = {
    "precompute": ["precompute", "CONFIG"],
    "plan": ["plan", "CONFIG"],
    "train": ["train", "CONFIG", "train.max_train_steps=1"],
}
MANY = {"precompute": 50_000, "plan": 50_000, "train": 100_000}


def write_data(folder: Path, count: int) -> Path:
    """Write `count` videos that differ in their last bytes, and a config; return the config's path."""
    clips = folder / "clips"
    clips.mkdir(parents=True)
    write_video(clips / "first.mp4", 0, SIDE, SIDE, FRAMES)
    content = (clips / "first.mp4").read_bytes()
    names = [f"{number:06}.mp4" for number in range(count)]
    for number, name in enumerate(names):
        (clips / name).write_bytes(content + b"\0\0\0\x10free" + number.to_bytes(8))
    (clips / "videos.txt").write_text("\n".join(names))
    (clips / "prompts.txt").write_text("\n".join(CAPTION.format(number=number) for number in range(count)))
    config = folder / "config.toml"
    lines = [
        "[model]",
        f'pretrained_model_name_or_path = "{ROOT / "demo" / "mini"}"',
        "[data]",
        'name = "scale"',
        f'instance_data_root = "{clips}"',
        'caption_column = "prompts.txt"',
        'video_column = "videos.txt"',
        "fps = 0",
        f"frame_buckets = [{FRAMES}]",
        "allow_uneven_frame_buckets = true",
        f"resolution_buckets = [[{SIDE}, {SIDE}]]",
        "held_out_clips = 2",
        "[precompute]",
        f'cache = "{folder / "cache"}"',
        'device = "cpu"',
        "remember_files = true",
        "[train]",
        f'output_dir = "{folder / "run"}"',
        'device = "cpu"',
        "max_tokens_per_pack = 512",
    ]
    config.write_text("\n".join(lines))
    return config


def store_all(config_file: Path) -> None:
    """Store a sample of random numbers for every clip and prompt, and write the view, without an encoder."""
    from dataclasses import replace

    import torch

    from bench.shards import write_shard
    from precompute.assignments import take_inventory
    from precompute.discover import open_stage, survey
    from precompute.estimate import find_work
    from precompute.findings import tokens_of
    from precompute.run import find_latent_rgb, make_view
    from shared.cache.collection import write_recipe
    from shared.cache.index import write_index
    from shared.cache.shard import Sample
    from shared.cache.view import write_view
    from shared.config_file import load_config
    from shared.media.probe import Probed, mark_of, probe

    config = load_config(config_file, None)
    stage = open_stage(config)
    paths = sorted(config.data.instance_data_root.glob("*.mp4"))
    first = probe(paths[-1])

    def probe_all(paths: Iterable[Path]) -> Iterator[Probed]:
        for path in paths:
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            yield replace(first, probe=replace(first.probe, mark=mark_of(path.stat()), sha256=sha256))

    pool: Any = SimpleNamespace(probe_all=probe_all)
    wanted = survey(stage, pool)
    tokens_of(stage, wanted, publish=True)
    clip = {"moments": torch.randn(32, 2, SIDE // 8, SIDE // 8)}
    clip["thumbnails"] = torch.randint(256, (2, 3, SIDE // 8, SIDE // 8), dtype=torch.uint8)
    conventions = stage.encoders.conventions
    embeds = torch.randn(conventions.text_length, conventions.text_embed_dim)
    write_recipe(stage.storage, wanted.latents, wanted.latents_recipe)
    write_recipe(stage.storage, wanted.prompts, wanted.prompts_recipe)
    for work, tensors in zip(find_work(stage, wanted), (clip, {"prompt_embeds": embeds}), strict=True):
        for shard in work.shards:
            samples = [Sample(key, tensors, {}) for key in shard.keys]
            write_shard(stage.storage, shard.folder, samples)
    for collection in (wanted.latents, wanted.prompts):
        write_index(stage.storage, collection.folder)
    inventory = take_inventory(stage.storage, wanted.latents)
    marks = {"vae": stage.encoders.vae.marks, "text_encoder": stage.encoders.text_encoder.marks}
    view = make_view(config, wanted, dict.fromkeys(wanted.texts, 1), conventions.text_length, inventory)
    write_view(stage.storage, replace(view, encoders=marks, latent_rgb=find_latent_rgb(stage.storage, view)))


def run_command(name: str, folder: Path) -> dict[str, float]:
    """Run a command on a stored data set; return CPU seconds and peak resident MiB, of its processes too."""
    config = str(folder / "config.toml")
    arguments = [config if word == "CONFIG" else word for word in COMMANDS[name]]
    with tempfile.TemporaryDirectory() as run:
        if name == "train":
            arguments.append(f"train.output_dir={run}")
        with subprocess.Popen(
            [sys.executable, "-m", "precog", *arguments],
            cwd=ROOT,
            env=environment(folder),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        ) as child:
            assert child.stderr
            errors = child.stderr.read()
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, errors.decode()[-2000:]
    return {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_mib": usage.ru_maxrss / 1024}


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a process that works in `folder`, with one thread."""
    own = {"XDG_CACHE_HOME": str(folder / "user"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **own}


def measure_growth(folder: Path, few: int, many: dict[str, int], rounds: int) -> dict[str, Any]:
    """Run each command on `few` and on its `many` clips, all stored already; return its cost per clip."""
    for count in sorted({few, *many.values()}):
        if not (folder / str(count) / "cache" / "datasets").exists():
            config = write_data(folder / str(count), count)
            command = [sys.executable, "-m", "bench.scale", "--store", str(config)]
            subprocess.run(command, check=True, cwd=ROOT, env=environment(folder / str(count)))
    found = {}
    for name, count in many.items():
        runs = [[run_command(name, folder / str(size)) for size in (few, count)] for _ in range(rounds)]
        each = [(high["cpu_seconds"] - low["cpu_seconds"]) / (count - few) * 1000 for low, high in runs]
        peaks = [statistics.median(run["peak_mib"] for run in column) for column in zip(*runs, strict=True)]
        found[name] = {"ms_per_clip": statistics.median(each), "peak_mib": peaks, "clips": [few, count], "runs": runs}
    return found


def real_samples(count: int) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield key, latents and prompt of real-size samples in bf16, other numbers each."""
    import torch

    from shared.fingerprint import key_of

    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(32, (BUCKET[0] - 1) // 4 + 1, BUCKET[1] // 8, BUCKET[2] // 8, generator=generator).bfloat16()
    embeds = torch.randn(226, 4096, generator=generator).bfloat16()
    for key in sorted(key_of(number) for number in range(count)):
        yield key, {"moments": moments.roll(int(key[:4], 16))}, {"prompt_embeds": embeds.roll(int(key[:4], 16))}


def measure_writing() -> dict[str, float]:
    """Write one shard of real-size clips; return CPU seconds, and the growth of the peak resident size."""
    from shared.cache.shard import Sample, ShardWriter
    from shared.cache.storage import open_storage

    with tempfile.TemporaryDirectory() as folder:
        before, started = peak_mib(), time.process_time()
        with ShardWriter(open_storage(folder), "latents/real/bucket") as writer:
            for key, latents, _ in real_samples(SAMPLES):
                writer.add(Sample(key, latents, {}))
            writer.finish({}, 0)
        return {"cpu_seconds": time.process_time() - started, "peak_growth_mib": peak_mib() - before}


def peak_mib() -> float:
    """Return the peak resident size of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_reading(rounds: int) -> dict[str, Any]:
    """Read real-size samples once each, through readers that were just opened, and from plain safetensors files.

    Interleaved; a byte of every page is touched, since safetensors maps its files.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from bench.shards import write_shard
    from shared.cache.collection import Collection, SampleReader
    from shared.cache.shard import Sample
    from shared.cache.storage import open_storage

    kinds = ("latents", "prompts")
    times: dict[str, list[float]] = {"ours": [], "safetensors": []}
    with tempfile.TemporaryDirectory() as folder:
        storage, keys = open_storage(f"{folder}/cache"), []
        shards: dict[str, list[Sample]] = {kind: [] for kind in kinds}
        for key, *parts in real_samples(SAMPLES):
            keys.append(key)
            for kind, tensors in zip(kinds, parts, strict=True):
                shards[kind].append(Sample(key, tensors, {}))
                save_file(tensors, f"{folder}/{kind}-{key}.safetensors")
        for kind in kinds:
            write_shard(storage, f"{kind}/real", shards.pop(kind))

        def touch(tensors: dict[str, Any]) -> None:
            for tensor in tensors.values():
                tensor.view(torch.uint8).flatten()[::4096].sum()

        for _ in range(rounds):
            readers = [SampleReader(storage, Collection(kind, "real")) for kind in kinds]
            for number, key in enumerate(keys):
                files = [f"{folder}/{kind}-{key}.safetensors" for kind in kinds]
                arms: list[tuple[str, list[Callable[[], dict[str, Any]]]]] = [
                    ("ours", [partial(reader.read, key) for reader in readers]),
                    ("safetensors", [partial(load_file, file) for file in files]),
                ]
                for name, reads in arms[:: 1 - 2 * (number % 2)]:
                    started = time.process_time()
                    for read in reads:
                        touch(read())
                    times[name].append(1000 * (time.process_time() - started))
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {"median_ms": medians, "mean_ms": {name: statistics.mean(found) for name, found in times.items()}}


def measure_examples(rounds: int, threads: int) -> dict[str, float]:
    """Draw real-size training examples in `threads` threads, as a step does; return milliseconds per example."""
    import torch

    from bench.models import published_conventions
    from bench.shards import write_shard
    from shared.cache.collection import Collection
    from shared.cache.shard import Sample
    from shared.cache.storage import open_storage
    from shared.cache.view import View, ViewRow
    from shared.config import Train
    from train.data.dataset import Dataset
    from train.data.order import Draw
    from train.objective import schedule_from

    torch.set_num_threads(1)
    walls, cpus = [], []
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(folder)
        latents, prompts = Collection("latents", "real"), Collection("prompts", "real")
        found = list(real_samples(8))
        write_shard(storage, latents.folder, [Sample(key, tensors, {}) for key, tensors, _ in found])
        write_shard(storage, prompts.folder, [Sample(key, tensors, {}) for key, _, tensors in found])
        rows = tuple(
            ViewRow("a.mp4", 0.0, 1.0, *BUCKET, False, key, ("",), (1.0,), (key,), (0,), "train", "")
            for key, _, _ in found
        )
        view = View("real", latents, prompts, {"": found[0][0]}, rows)
        schedule = schedule_from(torch.linspace(0.9999, 0.01, 1000))
        data = Dataset(storage, view, "train", published_conventions("5b"), schedule, Train(output_dir=Path(folder)))
        with ThreadPoolExecutor(threads) as readers:
            for epoch in range(rounds):
                wall, cpu = time.perf_counter(), time.process_time()
                list(readers.map(lambda row, epoch=epoch: data.example(Draw(epoch, row), 500), range(8)))
                walls.append(1000 * (time.perf_counter() - wall) / 8)
                cpus.append(1000 * (time.process_time() - cpu) / 8)
    return {"wall_ms": statistics.median(walls), "fastest_ms": min(walls), "cpu_ms": statistics.median(cpus)}


def measure_decoding(rounds: int) -> dict[str, Any]:
    """Take 49 of 147 frames at 1080p, resized and at full size, and in a plain PyAV loop; CPU seconds, interleaved."""
    import av

    from precompute.pixels import scaled_into
    from shared.media.child import FileRows
    from shared.media.decode import decode_rows, shape_of
    from shared.media.probe import probe
    from shared.model.geometry import Bucket

    indices = tuple(range(0, 147, 3))
    times: dict[str, list[float]] = {"ours": [], "ours, full size": [], "PyAV loop": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip.mp4")
        write_video(path, 0, 1080, 1920, 147)

        def ours(size: tuple[int, int] | None) -> None:
            found = probe(path)
            stamps = [found.timestamps_us[index] for index in indices]
            scaled = (
                scaled_into(1080, 1920, Bucket(49, *size), "center", "") if size else shape_of(found.probe, None)[0]
            )
            with os.fdopen(os.memfd_create("frames"), "wb", buffering=0) as memory:
                decode_rows(path, found.probe, indices, stamps, "auto", scaled, FileRows(memory))

        def plain() -> None:
            with av.open(str(path)) as source:
                wanted = set(indices)
                for number, frame in enumerate(source.decode(video=0)):
                    if number in wanted:
                        frame.to_ndarray(format="rgb24")

        arms: dict[str, Callable[[], None]] = {
            "ours": lambda: ours((480, 720)),
            "ours, full size": lambda: ours(None),
            "PyAV loop": plain,
        }
        for _ in range(rounds):
            for name, decode in arms.items():
                started = time.process_time()
                decode()
                times[name].append(time.process_time() - started)
    found = {name: {"median_s": statistics.median(each), "each": each} for name, each in times.items()}
    base = statistics.median(times["PyAV loop"])
    return {**found, "ratio": statistics.median(times["ours"]) / base}


def as_markdown(found: dict[str, Any]) -> str:
    """Return the table."""
    rows = [
        [
            f"{name}, all stored",
            f"{each['ms_per_clip']:.3f} ms of CPU per clip",
            " / ".join(f"{peak:.0f}" for peak in each["peak_mib"])
            + " MiB peak at "
            + " / ".join(f"{count:,}" for count in each["clips"]),
        ]
        for name, each in found.get("growth", {}).items()
    ]
    names = {
        "write": f"write a shard of {SAMPLES} real-size clips",
        "read": "first read of a real-size sample",
        "example": "draw a real-size example, two threads",
        "decode": "49 of 147 frames of 1080p",
    }
    rows += [
        [line, json.dumps({key: found[name][key] for key in found[name] if key != "each"}), ""]
        for name, line in names.items()
        if name in found
    ]
    return record.table(["what", "cost", "memory"], rows) + "\n" + record.describe(found["circumstances"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=["growth", "write", "read", "example", "decode"])
    parser.add_argument("--commands", nargs="*", default=[*COMMANDS])
    parser.add_argument("--few", type=int, default=1_000)
    parser.add_argument("--many", type=int, help=f"clips of every command; by default {MANY}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the data sets here, for the next time")
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rounds = arguments.rounds
    alone: dict[str, Callable[[], Any]] = {
        "write": measure_writing,
        "read": lambda: measure_reading(rounds),
        "example": lambda: measure_examples(5 * rounds, threads=2),
        "decode": lambda: measure_decoding(rounds),
    }
    if arguments.store:
        store_all(arguments.store)
        return
    if arguments.measure:
        print(json.dumps(alone[arguments.measure]()))
        return
    found: dict[str, Any] = {"circumstances": record.circumstances()}
    if "growth" in arguments.only:
        with tempfile.TemporaryDirectory() as scratch:
            folder = arguments.folder or Path(scratch)
            many = {name: arguments.many or MANY[name] for name in arguments.commands}
            found["growth"] = measure_growth(folder, arguments.few, many, rounds)
    for name in alone.keys() & set(arguments.only):  # each in a process of its own
        command = [sys.executable, "-m", "bench.scale", "--measure", name, "--rounds", str(rounds)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        found[name] = json.loads(answer.stdout.splitlines()[-1])
    text = as_markdown(found)
    record.write("scale" if "growth" in found else "scale-samples", found, text)
    print(text)


if __name__ == "__main__":
    main()

"""The first hour on a CUDA GPU: fourteen points, each in processes of its own with a limit of ten minutes.

    python -m bench.first_gpu                # every point; bench/results/<gpu>-first-hour.json and .md after each
    python -m bench.first_gpu --points 2 5   # some of them
    python -m bench.first_gpu --dry-run      # the points that a CPU can take, on tiny models; writes nothing

A point that fails, hangs or kills its process is reported, and the next one follows. Without CUDA the exit code is 2.
"""

import argparse
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch

from bench import record
from bench.arms import ARMS, LEAN, Case, Stage
from bench.gpu_train import TINY
from bench.models import PUBLISHED, build_small, conventions_for, make_pack
from shared.config import Train
from shared.errors import UsageError
from shared.model.geometry import Bucket
from train.memory.simulation import predict_peak
from train.memory.trial import open_tried
from train.objective import clip_loss
from train.transformer.attention import Backend, attend, choose_backend
from train.transformer.compiled import compiled_kernels
from train.transformer.engine import Plan, open_engine
from train.transformer.forward import predict

LIMIT_SECONDS = 590
ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
CLIP, TINY_CLIP = Bucket(49, 480, 720), Bucket(9, 64, 96)
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Point:
    """One thing to find out."""

    title: str
    check: "Callable[[torch.device], dict[str, Any]] | None" = None
    """A function of this module, run in a child process."""
    command: list[str] = field(default_factory=list)
    """A program in place of a function."""
    needs: str = ""
    """A program without which the point is left out."""


def attention(device: torch.device, lengths: Sequence[int] = (80, 261, 320, 704, 4276, 17776)) -> dict[str, Any]:
    """Compare every backend, forward and backward, with math in fp32."""
    found: dict[str, Any] = {}
    heads = 2  # math keeps all scores
    for length in lengths if device.type == "cuda" else lengths[:3]:
        for dtype in (torch.bfloat16, torch.float16):
            generator = torch.Generator(device).manual_seed(length)
            inputs = torch.randn(4, length, heads, 64, generator=generator, device=device).to(dtype)
            exact = _attention_results("math", inputs.float())
            for backend in [name for name in get_args(Backend) if name not in ("auto", "math")]:
                try:
                    choose_backend(backend, device, dtype, heads, 64)
                    pairs = zip(_attention_results(backend, inputs), exact, strict=True)
                    worst = max(float((one - two).abs().max() / two.abs().max()) for one, two in pairs)
                    assert worst < 0.05, f"differs by {worst:.3f}"
                    found[f"{backend} {length} {dtype}"] = worst
                except (AssertionError, RuntimeError, UsageError) as error:
                    found[f"{backend} {length} {dtype}"] = str(error).splitlines()[0]
    return found


def _attention_results(backend: Backend, inputs: torch.Tensor) -> list[torch.Tensor]:
    *heads, gradient = (part.detach().requires_grad_() for part in inputs)
    result = attend(heads[0], heads[1], heads[2], [inputs.shape[1]], backend)
    gradients = torch.autograd.grad(result, heads, gradient.detach().flatten(1))
    return [value.detach().float() for value in (result, *gradients)]


def compiled_against_eager(device: torch.device) -> dict[str, Any]:
    """Compare the adapter's gradient of every plan, compiled, with the eager one."""
    model, conventions = build_small(torch.bfloat16, device)
    long, short = ((256, 384), (128, 192)) if device.type == "cuda" else ((64, 96), (64, 64))  # bf16 is slow on a CPU
    clips = make_pack(conventions, [Bucket(9, *long), Bucket(17, *short)], torch.bfloat16, device)
    found: dict[str, Any] = {}
    for name, arm in ARMS.items():
        if arm.plan is None or arm.plan.base_precision != "model":
            continue
        gradients = []
        for compiled in (False, True):
            engine = open_engine(model, replace(arm.plan, compile=False), device)
            if compiled:
                engine = replace(engine, kernels=compiled_kernels("inductor" if device.type == "cuda" else "eager"))
            model.zero_grad(set_to_none=True)
            predictions = predict(model, clips, conventions, engine)
            torch.autograd.backward(torch.stack([value.float().square().mean() for value in predictions]).sum())
            gradients.append(torch.cat([v.grad.flatten().float() for v in model.parameters() if v.grad is not None]))
        cosine = float(torch.cosine_similarity(gradients[0], gradients[1], dim=0))
        assert cosine > 0.999, f"{name}: cosine {cosine}"
        found[name] = cosine
    return found


def lean_memory(device: torch.device) -> dict[str, Any]:
    """Take three lean steps of a 5B and compare the allocated memory with the simulation."""
    config = PUBLISHED["5b"] | (TINY if device.type == "cpu" else {})
    clip = TINY_CLIP if device.type == "cpu" else CLIP
    stage = Stage(Case("5b", clip, 64, ["ours, lean"]), config, device)
    step = stage.enter(ARMS["ours, lean"])
    trained = [value for value in stage.model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    for _ in range(3):
        step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    train = Train(output_dir=Path("unused"), lora_rank=64, lora_alpha=64)
    predicted = predict_peak(config, conventions_for(config), train, LEAN, [clip], torch.bfloat16).peak
    if device.type == "cpu":
        return {"predicted_gib": predicted / GIB}
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    found = {"predicted_gib": predicted / GIB, "allocated_gib": allocated / GIB, "reserved_gib": reserved / GIB}
    assert abs(allocated / predicted - 1) < 0.03 and reserved < 6 * GIB, found
    return found


def profile(device: torch.device) -> dict[str, Any]:
    """Profile one lean step: count host synchronizations, and the time in which copies run."""
    config = PUBLISHED["5b"] | ({"num_layers": 8} if device.type == "cuda" else TINY)
    stage = Stage(Case("5b", CLIP if device.type == "cuda" else TINY_CLIP, 64, ["ours, lean"]), config, device)
    step = stage.enter(ARMS["ours, lean"])
    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        torch.cuda.synchronize()
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as taken:
        step()
    events = taken.key_averages()
    waits = {event.key: event.count for event in events if "Synchronize" in event.key or event.key == "aten::item"}
    copies = {event.key: event.self_device_time_total / 1e6 for event in events if "Memcpy" in event.key}
    return {"host_waits": waits, "seconds_of_copies": copies}


def soak(device: torch.device) -> dict[str, Any]:
    """Take 1,000 lean steps of changing packs; host and device memory must not grow."""
    model, conventions = build_small(torch.bfloat16, device)
    engine = open_engine(model, replace(LEAN, compile=False), device)
    buckets = [Bucket(9, 64, 96), Bucket(17, 64, 96), Bucket(9, 128, 192), Bucket(17, 128, 128)]
    steps, resident = (1000 if device.type == "cuda" else 20), []
    for step in range(steps):
        pack = [buckets[step % 4], buckets[step // 4 % 4]]
        clips = make_pack(conventions, pack, torch.bfloat16, device)
        losses = [clip_loss(value, torch.zeros_like(value)) for value in predict(model, clips, conventions, engine)]
        torch.autograd.backward(torch.stack(losses).mean())
        model.zero_grad(set_to_none=True)
        if step % (steps // 10) == 0:
            gc.collect()
            resident.append(int(Path("/proc/self/statm").read_text("utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert resident[-1] - resident[len(resident) // 2] < 64 * 2**20, resident
    return {"steps": steps, "resident_bytes": resident}


def kill_and_resume(device: torch.device) -> dict[str, Any]:
    """Kill a run of the demo, resume it, and compare its losses with those of one that was not interrupted."""
    losses = []
    with TemporaryDirectory() as folder:
        options = [f"precompute.cache={folder}/cache", f"train.device={device.type}", "train.max_train_steps=12"]
        options += ["train.checkpointing_steps=5", "train.deterministic=true"]
        _precog("precompute", *options)
        for name in ("whole", "killed"):
            place = Path(folder, name)
            command = ["train", *options, f"train.output_dir={place}"]
            if name == "killed":
                child = subprocess.Popen(
                    [PYTHON, "-m", "precog", command[0], "configs/demo.toml", *command[1:]], cwd=ROOT
                )
                while child.poll() is None and not (place / "checkpoint-000005").exists():
                    time.sleep(0.05)
                child.send_signal(signal.SIGKILL)
                child.wait()
            _precog(*command)
            lines = (place / "metrics.jsonl").read_text("utf-8").splitlines()
            losses.append([json.loads(line)["loss"] for line in lines])
    differences = [abs(one / two - 1) for one, two in zip(*losses, strict=True)]
    assert max(differences) < 1e-4, losses
    return {"largest_relative_difference": max(differences)}


def without_a_compiler(device: torch.device) -> dict[str, Any]:
    """Run the demo with no compiler on the path: one line says so, and the run goes on."""
    with TemporaryDirectory() as folder:
        bare = {"PATH": folder, "CC": "", "TRITON_CACHE_DIR": folder, "TORCHINDUCTOR_CACHE_DIR": folder}
        return _one_step(device, folder, bare, "compiling fails here")


def without_pinned_memory(device: torch.device) -> dict[str, Any]:
    """Run the demo with no lockable memory: copies may be slower, and the run goes on."""
    import resource

    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    with TemporaryDirectory() as folder:
        return _one_step(device, folder, {}, "cannot be pinned", "memory.offload_activations=true")


def _one_step(device: torch.device, folder: str, environment: dict[str, str], line: str, *more: str) -> dict[str, Any]:
    options = [f"precompute.cache={folder}/cache", f"train.device={device.type}", "train.max_train_steps=1", *more]
    _precog("precompute", *options)
    told = _precog("train", *options, f"train.output_dir={folder}/run", environment=environment)
    return {"said": [text for text in told.splitlines() if line in text]}


def _precog(command: str, *options: str, environment: dict[str, str] | None = None) -> str:
    arguments = [PYTHON, "-m", "precog", command, "configs/demo.toml", *options]
    done = subprocess.run(
        arguments, cwd=ROOT, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stderr[-500:]}"
    return done.stderr


def small_card(device: torch.device) -> dict[str, Any]:
    """Limit the card to 8 GiB, and let a 5B find the first plan that runs."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(8 * GIB / torch.cuda.mem_get_info()[1])
    config = PUBLISHED["5b"] | (TINY if device.type == "cpu" else {})
    clip = TINY_CLIP if device.type == "cpu" else CLIP
    host = Stage(Case("5b", clip, 64, []), config, torch.device("cpu"))
    host.enter(ARMS["ours, lean"])
    plans = [Plan("attention_output", attention="auto"), replace(LEAN, compile=False)]
    _, trial = open_tried(host.model, plans, host.conventions, [clip], device)
    return {"plan": str(trial.plan), "peak_gib": trial.peak_memory_bytes / GIB}


SANITIZED = ["compute-sanitizer", "--error-exitcode", "1", PYTHON, "-m", "bench.first_gpu", "--check", "attention-261"]
TWO_RANKS = [
    PYTHON,
    "-m",
    "torch.distributed.run",
    "--nproc-per-node",
    "2",
    "-m",
    "precog",
    "train",
    "configs/demo.toml",
]
POINTS = {
    1: Point("the tests for a GPU", command=[PYTHON, "-m", "pytest", "-m", "gpu", "tests/train/test_gpu.py"]),
    2: Point("attention backends against math in fp32", attention),
    3: Point("attention under compute-sanitizer", command=SANITIZED, needs="compute-sanitizer"),
    4: Point("compiled against eager", compiled_against_eager),
    5: Point("lean 5B: memory against the simulation", lean_memory),
    6: Point("profile of a lean step", profile),
    7: Point("1,000 lean steps of mixed packs", soak),
    8: Point("SIGKILL and resume", kill_and_resume),
    9: Point("no compiler", without_a_compiler),
    10: Point("no pinned memory", without_pinned_memory),
    11: Point("a card of 8 GiB", small_card),
    12: Point("two GPUs with previews", command=[*TWO_RANKS, "train.preview_steps=5", "train.max_train_steps=10"]),
    13: Point("stage 1", command=[PYTHON, "-m", "bench.gpu_precompute"]),
    14: Point("training, first piece", command=[PYTHON, "-m", "bench.gpu_train", "--piece", "1"]),
}
NEEDS_A_GPU = {1, 3, 9, 12, 13, 14}
"""Points that a dry run leaves out: programs with their own dry run, and what only a card can show."""


def run_point(number: int, point: Point, device_type: str, limit_seconds: float = LIMIT_SECONDS) -> dict[str, Any]:
    """Run one point in its own process; return its result, whatever happens."""
    if point.needs and shutil.which(point.needs) is None:
        return {"title": point.title, "result": f"not run: {point.needs} not found"}
    if number == 12 and torch.cuda.device_count() < 2:
        return {"title": point.title, "result": "not run: one GPU"}
    command = point.command or [PYTHON, "-m", "bench.first_gpu", "--check", str(number), "--device", device_type]
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=limit_seconds, check=False, errors="replace"
        )
        result, output, errors = ("ok" if done.returncode == 0 else f"exit {done.returncode}"), done.stdout, done.stderr
    except subprocess.TimeoutExpired:
        result, output, errors = f"not done in {limit_seconds:g} s", "", ""
    found: dict[str, Any] = {"title": point.title, "result": result, "seconds": round(time.monotonic() - started, 1)}
    if figures := re.findall(r"^FIGURES (.*)$", output, flags=re.MULTILINE):
        found["figures"] = json.loads(figures[-1])
    if result != "ok":
        found["end_of_output"] = (output + errors)[-2000:]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.first_gpu")
    parser.add_argument("--points", type=int, nargs="+", choices=sorted(POINTS), default=sorted(POINTS))
    parser.add_argument("--dry-run", action="store_true", help="what a CPU can take, on tiny models")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if given.check is not None:
        check = POINTS[2 if given.check == "attention-261" else int(given.check)].check
        assert check is not None
        figures = attention(device, [261]) if given.check == "attention-261" else check(device)
        print(f"FIGURES {json.dumps(figures)}")
        return 0
    if not given.dry_run and not torch.cuda.is_available():
        print("bench.first_gpu CUDA not found; run with --dry-run on a CPU", file=sys.stderr)
        return 2
    device_type = "cpu" if given.dry_run else "cuda"
    found: dict[str, Any] = {"circumstances": record.circumstances(device_type), "points": {}}
    for number in given.points:
        if given.dry_run and number in NEEDS_A_GPU:
            continue
        found["points"][number] = run_point(number, POINTS[number], device_type)
        print(f"{number:>2} {POINTS[number].title}: {found['points'][number]['result']}", flush=True)
        if not given.dry_run:  # after every point, so that a later failure loses nothing
            record.write(f"{record.short_name(torch.device('cuda'))}-first-hour", found, as_markdown(found))
    results = [point["result"] for point in found["points"].values()]
    return int(any(not result.startswith(("ok", "not run")) for result in results))


def as_markdown(found: dict[str, Any]) -> str:
    """Return one row per point."""
    rows = [
        [number, point["title"], point["result"], point.get("seconds", ""), json.dumps(point.get("figures", ""))[:300]]
        for number, point in found["points"].items()
    ]
    head = "The first hour on a GPU.\n"
    return "\n".join(
        [head, record.table(("", "point", "result", "s", "figures"), rows), record.describe(found["circumstances"])]
    )


if __name__ == "__main__":
    sys.exit(main())

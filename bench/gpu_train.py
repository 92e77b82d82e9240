"""Seconds per step and memory of training on a CUDA GPU at the published sizes: `make bench-gpu-train PIECE=1`.

    python -m bench.gpu_train --piece 1        # one of four, each in ten minutes; bench/results/<gpu>-<piece>.json
    python -m bench.gpu_train --dry-run        # every arm once on a tiny model on the CPU; writes nothing

Weights are random and made on the card. Every arm of a case trains the same model on the same clip; only what the arm
keeps on the card is there while it runs. Arms take turns, forth and back; one of them comes twice, as A/A control.
Before anything is timed, loss and adapter gradients are compared on two blocks. Without CUDA it exits with 2.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import peft
import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor, nn

from bench.cpu_memory import bootstrap
from bench.models import PUBLISHED, SMALL, build, conventions_for, make_pack
from bench.roofline import measure_roofline
from shared.geometry import Bucket, video_tokens
from shared.variants import Conventions
from train.attention import pinned
from train.engine import Engine, Plan, open_engine
from train.forward import predict, predict_reference
from train.objective import clip_loss

RESULTS = Path(__file__).parent / "results"
LEAST_COSINE, MOST_LOSS_DIFFERENCE = 0.99, 0.01
OURS = Plan("attention_output", compile=True)
OFFLOADED = replace(OURS, offload_activations=True, modulation_table=True)
LEAN = replace(OFFLOADED, stream_weights=2)


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to train."""

    plan: Plan | None
    """None: diffusers' forward, autocast, full checkpointing, peft."""
    compiled_reference: bool = False
    """The reference with cuDNN attention and its blocks compiled."""


ARMS = {
    "reference": Arm(None),
    "reference, cuDNN, compiled": Arm(None, compiled_reference=True),
    "ours, full": Arm(replace(OURS, activations="full")),
    "ours, attention_output": Arm(OURS),
    "ours, attention_output again (A/A)": Arm(OURS),
    "ours, attention_output, not compiled": Arm(replace(OURS, compile=False)),
    "ours, block_input": Arm(replace(OURS, activations="block_input")),
    "ours, offloaded": Arm(OFFLOADED),
    "ours, lean": Arm(LEAN),
    "ours, offloaded, int8 base": Arm(replace(OFFLOADED, base_precision="int8")),
}
A_A = ("ours, attention_output", "ours, attention_output again (A/A)")


@dataclass(frozen=True, slots=True)
class Case:
    """One model, one clip, one rank."""

    variant: str
    bucket: Bucket
    lora_rank: int
    arms: Sequence[str]
    soak_steps: int = 0
    """Steps of the lean arm at the end, which must not need more and more memory."""


SHORT, LONG = Bucket(49, 480, 720), Bucket(81, 768, 1360)
FEW = ("reference", *A_A, "ours, lean")
PIECES: dict[int, list[Case]] = {
    1: [Case("5b", SHORT, 128, [name for name in ARMS if "int8" not in name])],
    2: [Case("5b", SHORT, 64, [*FEW, "ours, offloaded", "ours, offloaded, int8 base"])],
    3: [
        Case("2b", SHORT, 64, [name for name in ARMS if "int8" not in name]),
        Case("2b", SHORT, 128, FEW, soak_steps=300),
    ],
    4: [Case("1.5-5b", LONG, 64, FEW), Case("1.5-5b", LONG, 128, [*A_A, "ours, lean"])],
}
DRY = [Case("5b", Bucket(9, 64, 96), 4, list(ARMS), soak_steps=2)]


@dataclass(slots=True)
class Samples:
    """Of one arm in one case."""

    seconds: list[list[float]] = field(default_factory=list)
    """Of each visit, each step's."""
    first_step_seconds: float = 0.0
    """The first visit's first step: compilation and all."""
    max_allocated: int = 0
    max_reserved: int = 0
    failure: str = ""


class Stage:
    """The card, on which one arm at a time stands with a model of its base precision; the others wait on the host."""

    def __init__(self, case: Case, transformer_config: dict[str, Any], device: torch.device) -> None:
        self.device, self._case, self._config = device, case, transformer_config
        self.conventions = conventions_for(transformer_config)
        self._models: dict[str, CogVideoXTransformer3DModel] = {}
        self.clips = make_pack(self.conventions, [case.bucket], torch.bfloat16, device)
        self.targets = [torch.randn_like(clip.latents[:, : self.conventions.out_channels]) for clip in self.clips]

    def enter(self, arm: Arm) -> Callable[[], Tensor]:
        """Bring what the arm keeps on the card, and nothing else; the forward and backward pass, giving the loss."""
        precision = arm.plan.base_precision if arm.plan else "model"
        for name, model in self._models.items():
            model.zero_grad(set_to_none=True)
            if name != precision:
                nn.Module.to(model, "cpu")
        self._release()
        if precision not in self._models:
            rank = self._case.lora_rank
            self._models[precision] = build(self._config, torch.bfloat16, self.device, rank)
        self.model = transformer = self._models[precision]
        on_gpu = self.device.type == "cuda"
        plan = arm.plan or Plan()
        if precision == "int8" and any("int8" in str(value.dtype) for value in transformer.parameters()):
            plan = replace(plan, base_precision="model")  # it is in eight bits already
        engine = open_engine(transformer, plan if on_gpu else replace(plan, compile=False), self.device)
        transformer.gradient_checkpointing = False
        for block in transformer.transformer_blocks:
            block._compiled_call_impl = None
        if arm.plan is None:
            transformer.enable_gradient_checkpointing()
            if arm.compiled_reference:
                for block in transformer.transformer_blocks:
                    block.compile(backend="inductor" if on_gpu else "eager", dynamic=False)
        self._release()
        return lambda: self._pass(arm, engine)

    def _pass(self, arm: Arm, engine: Engine) -> Tensor:
        if arm.plan is not None:
            velocities = predict(self.model, self.clips, self.conventions, engine)
        else:
            fast: Literal["cudnn", "flash"] = "cudnn" if self.device.type == "cuda" else "flash"
            attention = pinned(fast) if arm.compiled_reference else nullcontext()
            with attention, torch.autocast(self.device.type, torch.bfloat16):
                velocities = predict_reference(self.model, self.clips, self.conventions)
        losses = [clip_loss(*pair) for pair in zip(velocities, self.targets, strict=True)]
        loss = torch.stack(losses).mean()
        loss.backward()
        return loss.detach()

    def _release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def compare_arms(case: Case, transformer_config: dict[str, Any], device: torch.device) -> dict[str, dict[str, float]]:
    """Loss, and cosine of the adapter's gradient with the first arm's, on two blocks. Raises `SystemExit` if far."""
    stage = Stage(case, transformer_config | {"num_layers": 2}, device)
    found: dict[str, dict[str, float]] = {}
    expected: tuple[float, Tensor] | None = None
    for name in case.arms:
        loss = float(stage.enter(ARMS[name])())
        gradients = [value.grad for value in stage.model.parameters() if value.grad is not None]
        gradient = torch.cat([value.flatten().double().cpu() for value in gradients])
        expected = expected or (loss, gradient)
        cosine = float(torch.cosine_similarity(expected[1], gradient, dim=0))
        found[name] = {"loss": loss, "cosine": cosine}
        print(f"  gate {name:38} loss {loss:.6f}  cosine {cosine:.6f}")
        if not (cosine >= LEAST_COSINE and abs(loss / expected[0] - 1) <= MOST_LOSS_DIFFERENCE):
            raise SystemExit(f"bench.gpu_train: {name} does not compute what {case.arms[0]} does; nothing is timed")
    return found


def timed(action: Callable[[], Any], device: torch.device) -> float:
    """Seconds, by CUDA events where there are any."""
    if device.type != "cuda":
        started = time.perf_counter()
        action()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def visit(stage: Stage, arm: Arm, samples: Samples, steps: int) -> None:
    """One untimed step, then `steps` timed ones; AdamW and clipping belong to a step."""
    run_pass = stage.enter(arm)
    trained = [value for value in stage.model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=stage.device.type == "cuda")

    def step() -> None:
        run_pass()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    warm = timed(step, stage.device)
    samples.first_step_seconds = samples.first_step_seconds or warm
    samples.seconds.append([timed(step, stage.device) for _ in range(steps)])
    if stage.device.type == "cuda":
        samples.max_allocated = max(samples.max_allocated, torch.cuda.max_memory_allocated())
        samples.max_reserved = max(samples.max_reserved, torch.cuda.max_memory_reserved())


def run_case(
    case: Case, transformer_config: dict[str, Any], device: torch.device, rounds: int, deadline: float, roofline: float
) -> dict[str, Any]:
    """As many rounds as fit before `deadline` (of `time.monotonic`), each round forth or back; then the soak."""
    print(f"{case.variant}, {case.bucket}, rank {case.lora_rank}")
    gate = compare_arms(case, transformer_config, device)
    stage = Stage(case, transformer_config, device)
    samples = {name: Samples() for name in case.arms}
    longest = 0.0
    for index in range(rounds):
        for name in case.arms if index % 2 == 0 else reversed(case.arms):
            started = time.monotonic()
            if samples[name].failure or started + longest > deadline:
                continue
            try:
                visit(stage, ARMS[name], samples[name], steps=2)
            except torch.OutOfMemoryError as error:
                samples[name].failure = f"out of memory: {str(error).splitlines()[0]}"
            longest = max(longest, time.monotonic() - started) if index else 0.0
    flops = model_flops(stage.conventions, transformer_config, case.bucket, case.lora_rank)
    result = {
        "variant": case.variant,
        "clip": str(case.bucket),
        "lora_rank": case.lora_rank,
        "model_tflop": flops / 1e12,
        "gate": gate,
        "arms": {name: summary(found, flops, roofline) for name, found in samples.items()},
        "ratios": ratios(samples),
        "soak": soak(stage, case.soak_steps, deadline) if case.soak_steps else None,
    }
    for name, row in result["arms"].items():
        print(f"  {name:38}" + "".join(f" {key} {value}" for key, value in row.items() if key != "seconds"))
    return result


def summary(samples: Samples, flops: float, roofline: float) -> dict[str, Any]:
    """Median s/step, MFU against the measured matrix product, GiB, and every raw sample."""
    steps = [seconds for visited in samples.seconds for seconds in visited]
    if samples.failure or not steps:
        return {"failure": samples.failure or "no time left", "seconds": samples.seconds}
    median = statistics.median(steps)
    return {
        "seconds_per_step": round(median, 4),
        "mfu": round(flops / median / roofline, 4) if roofline else None,
        "max_allocated_gib": round(samples.max_allocated / 2**30, 3),
        "max_reserved_gib": round(samples.max_reserved / 2**30, 3),
        "compile_seconds": round(max(0.0, samples.first_step_seconds - median), 2),
        "seconds": samples.seconds,
    }


def ratios(samples: dict[str, Samples]) -> dict[str, Any]:
    """Seconds of the first arm over each other's, round by round, and of the A/A pair, with 95 % intervals."""
    first = next(iter(samples))
    pairs = {f"{first} / {name}": (first, name) for name in samples if name != first}
    if set(A_A) <= samples.keys():
        pairs[f"{A_A[0]} / {A_A[1]}"] = A_A
    found = {}
    for title, names in pairs.items():
        above, below = ([statistics.median(steps) for steps in samples[name].seconds] for name in names)
        values = [a / b for a, b in zip(above, below, strict=False)]
        if values:
            low, high = bootstrap(values)
            found[title] = {"median": statistics.median(values), "low": low, "high": high, "rounds": values}
    return found


def soak(stage: Stage, num_steps: int, deadline: float) -> dict[str, Any]:
    """Allocated and reserved bytes of the lean arm after every tenth of `num_steps` steps."""
    run_pass = stage.enter(ARMS["ours, lean"])
    sizes: list[tuple[int, int, int]] = []
    for step in range(1, num_steps + 1):
        run_pass()
        stage.model.zero_grad(set_to_none=True)
        if step % max(1, num_steps // 10) == 0 and stage.device.type == "cuda":
            sizes.append((step, torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
        if time.monotonic() > deadline:
            break
    return {"steps": step, "step_allocated_reserved": sizes}


def model_flops(conventions: Conventions, transformer_config: dict[str, Any], bucket: Bucket, lora_rank: int) -> float:
    """2P + 3.5A and the adapter's: P = 24 d^2 S L in linear layers forward, A = 4 S^2 d L in attention forward.

    The frozen base needs no weight gradients; FlashAttention's backward is 2.5 A. What is recomputed does not count.
    """
    tokens = conventions.text_length + video_tokens(bucket, conventions.patch_size, conventions.patch_size_t)
    width = transformer_config["num_attention_heads"] * transformer_config["attention_head_dim"]
    depth = transformer_config["num_layers"]
    linear, attention = 24 * width**2 * tokens * depth, 4 * tokens**2 * width * depth
    return float(2 * linear + 3.5 * attention + 3 * 16 * width * lora_rank * tokens * depth)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu_train")
    parser.add_argument("--piece", type=int, choices=sorted(PIECES), default=1)
    parser.add_argument("--rounds", type=int, default=12, help="at most")
    parser.add_argument("--limit-seconds", type=float, default=500, help="begin no visit that would end later")
    parser.add_argument("--dry-run", action="store_true", help="every arm once, tiny, on the CPU")
    given = parser.parse_args(arguments)
    if given.dry_run:
        config = SMALL | {"num_attention_heads": 2, "num_layers": 3, "time_embed_dim": 32}
        run_case(DRY[0], config, torch.device("cpu"), 1, time.monotonic() + given.limit_seconds, 0.0)
        return 0
    if not torch.cuda.is_available():
        print("bench.gpu_train needs a CUDA GPU; none is here (--dry-run runs without)", file=sys.stderr)
        return 2
    started, device = time.monotonic(), torch.device("cuda", torch.cuda.current_device())
    cases = PIECES[given.piece]
    head = PUBLISHED[cases[0].variant]
    tokens = conventions_for(head).text_length + video_tokens(cases[0].bucket, 2, head.get("patch_size_t"))
    measured = measure_roofline(device, tokens, head["num_attention_heads"])
    results = []
    for index, case in enumerate(cases, 1):
        # each case gets its share of the time that is left
        deadline = started + given.limit_seconds * index / len(cases)
        roofline = measured["matmul_tflops"] * 1e12
        results.append(run_case(case, PUBLISHED[case.variant], device, given.rounds, deadline, roofline))
    gpu = torch.cuda.get_device_name(device)
    written = {
        "gpu": gpu,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": "python -m bench.gpu_train " + " ".join(arguments if arguments is not None else sys.argv[1:]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "diffusers": diffusers.__version__,
            "peft": peft.__version__,
        },
        "roofline": measured,
        "cases": results,
        "seconds_in_all": time.monotonic() - started,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{gpu.lower().replace(' ', '-')}-{given.piece}.json"
    path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Seconds per step and memory of training on a CUDA GPU at the published sizes: `make bench-gpu-train PIECE=1`.

    python -m bench.gpu_train --piece 1        # one of four, ten minutes each; bench/results/<gpu>-train-<piece>.json
    python -m bench.gpu_train --dry-run        # every arm once on tiny models on the CPU; writes nothing

Weights are random and made on the device. Every arm of a case trains the same model on the same clip; the device holds
only what the arm keeps there. Arms take turns, forward and back; one arm runs twice, as A/A control. Before anything is
timed, loss and adapter gradients are compared on two blocks. An arm that fails or computes something else is reported
and not timed; the other arms continue. Exits with 2 without CUDA, and with 1 after a failed arm.
"""

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import record
from bench.arms import A_A, ARMS, ON_THE_EXACT_BASE, Arm, Case, Stage
from bench.models import PUBLISHED, SMALL, conventions_for
from bench.roofline import measure_roofline, timed
from shared.model.conventions import Conventions
from shared.model.geometry import Bucket
from train.memory.cost import block_flops

LEAST_COSINE, MOST_LOSS_DIFFERENCE = 0.99, 0.01
FEWEST_ROUNDS = 3
"""Fewer rounds give no interval."""
OUT_OF_MEMORY, NO_TIME = "out of memory", "no time left"
"""Failures of an arm that are no errors."""

SHORT, LONG, SOAK = Bucket(49, 480, 720), Bucket(81, 768, 1360), Bucket(17, 480, 720)
FEW = ("reference", *A_A, "ours, lean")
PIECES: dict[int, list[Case]] = {
    1: [Case("5b", SHORT, 128, ON_THE_EXACT_BASE)],
    2: [Case("5b", SHORT, 64, [*FEW, "ours, offloaded", "ours, offloaded, int8 base", "ours, offloaded, fp8 base"])],
    3: [
        Case("2b", SHORT, 64, ON_THE_EXACT_BASE),
        Case("2b", SHORT, 128, FEW),
        Case("2b", SOAK, 64, ["ours, lean"], soak_steps=300),
    ],
    4: [Case("1.5-5b", LONG, 64, FEW), Case("1.5-5b", LONG, 128, [*A_A, "ours, lean"])],
}
DRY = [
    Case("5b", Bucket(9, 64, 96), 4, list(ARMS), soak_steps=2),
    Case("2b", Bucket(9, 64, 96), 4, FEW),
    Case("1.5-5b", Bucket(9, 64, 96), 4, FEW),
]
TINY = {name: SMALL[name] for name in ("text_embed_dim", "max_text_seq_length")} | {
    "num_attention_heads": 2,
    "num_layers": 3,
    "time_embed_dim": 32,
}


@dataclass(slots=True)
class Samples:
    """Samples of one arm in one case."""

    seconds: list[list[float]] = field(default_factory=list)
    """Seconds of each step, by visit."""
    kernel: str = ""
    """Attention kernel; auto is torch's choice."""
    first_step_seconds: float = 0.0
    """Seconds of the first visit's first step, which also allocates."""
    visit_seconds: float = 0.0
    """Seconds of the whole last visit."""
    max_allocated: int = 0
    max_reserved: int = 0
    failure: str = ""


def attempt(action: Callable[[], Any]) -> tuple[Any, str]:
    """Return the action's result and "", or None and the failure, so that the other arms continue."""
    try:
        return action(), ""
    except torch.OutOfMemoryError as error:
        return None, f"{OUT_OF_MEMORY}: {_first_line(error)}"
    except Exception as error:
        traceback.print_exc()
        return None, f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def compare_arms(case: Case, transformer_config: dict[str, Any], device: torch.device) -> dict[str, dict[str, Any]]:
    """Compare the arms on two blocks: loss, cosine of the gradient with the first working arm's, or "failure".

    Also take the seconds of two passes, which differ by the time to compile; arms that share functions compile once.
    """
    stage = Stage(case, transformer_config | {"num_layers": 2}, device)
    found: dict[str, dict[str, Any]] = {}
    expected: tuple[float, Tensor] | None = None

    def two_passes(arm: Arm) -> tuple[float, Tensor, list[float]]:
        run_pass = stage.enter(arm)
        losses: list[Tensor] = []
        seconds = []
        for _ in range(2):
            stage.model.zero_grad(set_to_none=True)
            seconds.append(timed(lambda: losses.append(run_pass()), device))
        gradients = [value.grad for value in stage.model.parameters() if value.grad is not None]
        return float(losses[-1]), torch.cat([value.flatten().double().cpu() for value in gradients]), seconds

    for name in case.arms:
        result, failure = attempt(partial(two_passes, ARMS[name]))
        if failure:
            found[name] = {"failure": failure}
            continue
        loss, gradient, seconds = result
        expected = expected or (loss, gradient)
        cosine = float(torch.cosine_similarity(expected[1], gradient, dim=0))
        found[name] = {"loss": loss, "cosine": cosine, "first_and_second_pass_seconds": seconds}
        if not (cosine >= LEAST_COSINE and abs(loss / expected[0] - 1) <= MOST_LOSS_DIFFERENCE):
            found[name]["failure"] = "does not compute what the first arm does"
        print(f"  gate {name:38} loss {loss:.6f}  cosine {cosine:.6f}  {found[name].get('failure', '')}", flush=True)
    return found


def visit(stage: Stage, arm: Arm, samples: Samples, steps: int) -> None:
    """Run one untimed step, then `steps` timed ones; a step includes AdamW and clipping."""
    started = time.monotonic()
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
    samples.kernel = stage.kernel
    samples.seconds.append([timed(step, stage.device) for _ in range(steps)])
    if stage.device.type == "cuda":
        samples.max_allocated = max(samples.max_allocated, torch.cuda.max_memory_allocated())
        samples.max_reserved = max(samples.max_reserved, torch.cuda.max_memory_reserved())
    samples.visit_seconds = time.monotonic() - started


def run_case(
    case: Case, transformer_config: dict[str, Any], device: torch.device, rounds: int, deadline: float, roofline: float
) -> dict[str, Any]:
    """Run the rounds that fit before `deadline` (of `time.monotonic`), forward and back in turn; then the soak."""
    print(f"{case.variant}, {case.bucket}, rank {case.lora_rank}", flush=True)
    gate = compare_arms(case, transformer_config, device)
    stage = Stage(case, transformer_config, device)
    samples = {name: Samples(failure=gate[name].get("failure", "")) for name in case.arms}
    if case.soak_steps:
        rounds = 1  # the rest of the time is the soak's
    for index in range(rounds):
        for name in case.arms if index % 2 == 0 else reversed(case.arms):
            mine = samples[name]
            if not mine.failure and time.monotonic() + mine.visit_seconds <= deadline:
                _, mine.failure = attempt(partial(visit, stage, ARMS[name], mine, steps=2))
    flops = model_flops(stage.conventions, transformer_config, case.bucket, case.lora_rank)
    result: dict[str, Any] = {
        "variant": case.variant,
        "clip": str(case.bucket),
        "lora_rank": case.lora_rank,
        "model_tflop": flops / 1e12,
        "gate": gate,
        "arms": {name: summary(found, ARMS[name], gate[name], flops, roofline) for name, found in samples.items()},
        "ratios": ratios(samples),
    }
    control = result["ratios"].get(" / ".join(A_A), {"rounds": []})
    result["a_a_holds"] = None if len(control["rounds"]) < FEWEST_ROUNDS else control["low"] <= 1 <= control["high"]
    if case.soak_steps:
        result["soak"], failure = attempt(lambda: soak(stage, case.soak_steps, deadline))
        result["soak"] = result["soak"] or {"failure": failure}
    return result


def summary(samples: Samples, arm: Arm, gate: dict[str, Any], flops: float, roofline: float) -> dict[str, Any]:
    """Return median s/step, MFU against the measured matrix product, GiB, and every raw sample."""
    steps = [seconds for visited in samples.seconds for seconds in visited]
    if samples.failure or not steps:
        return {"failure": samples.failure or NO_TIME, "seconds": samples.seconds}
    median = statistics.median(steps)
    first, second = gate["first_and_second_pass_seconds"]
    return {
        "seconds_per_step": round(median, 4),
        "mfu": round(flops / median / roofline, 4),
        "max_allocated_gib": round(samples.max_allocated / 2**30, 3),
        "max_reserved_gib": round(samples.max_reserved / 2**30, 3),
        "compile_seconds": round(max(0.0, first - second), 2) if arm.compiles else 0.0,
        "first_step_seconds": round(samples.first_step_seconds, 2),
        "attention": samples.kernel,
        "seconds": samples.seconds,
    }


def ratios(samples: dict[str, Samples]) -> dict[str, Any]:
    """Return seconds of the first arm over each other arm's, by round, and of the A/A pair, with 95 % intervals."""
    first = next(iter(samples))
    pairs = {f"{first} / {name}": (first, name) for name in samples if name != first}
    if set(A_A) <= samples.keys():
        pairs[" / ".join(A_A)] = A_A
    found = {}
    for title, names in pairs.items():
        above, below = ([statistics.median(steps) for steps in samples[name].seconds] for name in names)
        values = [a / b for a, b in zip(above, below, strict=False)]
        if values:
            found[title] = record.interval(values) | {"rounds": values}
    return found


def soak(stage: Stage, num_steps: int, deadline: float) -> dict[str, Any]:
    """Return the lean arm's allocated and reserved bytes after every tenth of `num_steps` steps, and their growth."""
    run_pass = stage.enter(ARMS["ours, lean"])
    sizes: list[tuple[int, int, int]] = []
    for step in range(1, num_steps + 1):
        run_pass()
        stage.model.zero_grad(set_to_none=True)
        if step % max(1, num_steps // 10) == 0:
            on_gpu = stage.device.type == "cuda"
            held = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) if on_gpu else (0, 0)
            sizes.append((step, *held))
        if time.monotonic() > deadline:
            break
    grown = [last - first for first, last in zip(sizes[0][1:], sizes[-1][1:], strict=True)] if sizes else None
    return {"steps": step, "step_allocated_reserved": sizes, "grown_allocated_reserved": grown}


def model_flops(conventions: Conventions, transformer_config: dict[str, Any], bucket: Bucket, lora_rank: int) -> float:
    """Return the FLOPs of a step, recomputation left out; the numerator of MFU."""
    tokens, depth = conventions.num_tokens(bucket), int(transformer_config["num_layers"])
    width = int(transformer_config["num_attention_heads"]) * int(transformer_config["attention_head_dim"])
    adapter = 4 * 2 * width * lora_rank  # on query, key, value and output
    return depth * (block_flops(width, tokens, "full") + 6 * adapter * tokens)


def as_markdown(found: dict[str, Any]) -> str:
    """Return one section per case."""
    card = found["circumstances"]["device"]["name"]
    sections = [case_markdown(case) for case in found["cases"]]
    head = f"Stage 2 on {card}, random weights in bf16; medians.\n"
    return "\n".join([head, *sections, record.describe(found["circumstances"])])


def case_markdown(case: dict[str, Any]) -> str:
    columns = ("seconds_per_step", "mfu", "max_allocated_gib", "max_reserved_gib", "compile_seconds", "attention")
    rows = [
        [name, *(row.get(column, "") for column in columns), row.get("failure", "")]
        for name, row in case["arms"].items()
    ]
    ratios = [[name, row["median"], row["low"], row["high"]] for name, row in case["ratios"].items()]
    return "\n".join(
        [
            f"## {case['variant']}, {case['clip']}, rank {case['lora_rank']}\n",
            record.table(("", *(column.replace("_", " ") for column in columns), "failure"), rows),
            record.table(("ratio of seconds", "median", "low", "high"), ratios),
            "" if case["a_a_holds"] is not False else "The A/A control excludes 1: no ratio of this case is valid.\n",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu_train")
    parser.add_argument("--piece", type=int, choices=sorted(PIECES), default=1)
    parser.add_argument("--rounds", type=int, default=12, help="at most")
    parser.add_argument("--limit-seconds", type=float, default=500, help="begin no visit that would end later")
    parser.add_argument("--dry-run", action="store_true", help="every arm once, tiny, on the CPU")
    given = parser.parse_args(arguments)
    if not given.dry_run and not torch.cuda.is_available():
        print("bench.gpu_train CUDA not found; run with --dry-run on a CPU", file=sys.stderr)
        return 2
    started = time.monotonic()
    device = torch.device("cpu") if given.dry_run else torch.device("cuda", torch.cuda.current_device())
    cases = DRY if given.dry_run else PIECES[given.piece]
    configs = {case.variant: PUBLISHED[case.variant] | (TINY if given.dry_run else {}) for case in cases}
    head = configs[cases[0].variant]
    tokens = conventions_for(head).num_tokens(cases[0].bucket)
    sizes = {"side": 64, "copied_bytes": 1000, "repeats": 2} if given.dry_run else {}
    found: dict[str, Any] = {
        "circumstances": record.circumstances(device.type),
        "roofline": measure_roofline(device, tokens, head["num_attention_heads"], **sizes),
        "cases": [],
    }
    print(json.dumps(found["roofline"], indent=1), flush=True)
    for index, case in enumerate(cases, 1):
        # each case gets its share of the time that is left
        deadline = started + given.limit_seconds * index / len(cases)
        rounds = 1 if given.dry_run else given.rounds
        roofline = found["roofline"]["matmul_tflops"] * 1e12
        found["cases"].append(run_case(case, configs[case.variant], device, rounds, deadline, roofline))
        print(case_markdown(found["cases"][-1]), flush=True)
        found["seconds_in_all"] = time.monotonic() - started
        if not given.dry_run:  # after every case, so that a later failure loses nothing
            record.write(f"{record.short_name(device)}-train-{given.piece}", found, as_markdown(found))
    failures = [row.get("failure", "") for case in found["cases"] for row in case["arms"].values()]
    return int(any(failure and not failure.startswith((OUT_OF_MEMORY, NO_TIME)) for failure in failures))


if __name__ == "__main__":
    sys.exit(main())

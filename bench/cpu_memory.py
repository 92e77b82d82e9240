"""Exact counts and interleaved ratios of the memory engine on a CPU: `make bench`.

Counts (bytes kept, peak bytes, FLOPs) come from the real code on the meta device at the published sizes; they are
exact and the same on every machine. Ratios of seconds come from a small model on this CPU, arms interleaved ABBA with
an A/A control. Seconds per step and memory of a GPU cannot be had here; `bench/gpu_train.py` measures those.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench import record
from bench.models import PUBLISHED, build_small, make_pack, published_conventions
from shared.config import Train
from shared.model.geometry import Bucket
from train.memory.choice import GIB
from train.memory.simulation import predict_peak
from train.transformer.engine import Engine, Plan, open_engine
from train.transformer.forward import predict

CPU = torch.device("cpu")
PLANS = {
    "full": Plan("full"),
    "attention_output": Plan("attention_output"),
    "block_input": Plan("block_input"),
    "attention_output, offloaded": Plan("attention_output", offload_activations=True),
    "the same, int8 base": Plan("attention_output", offload_activations=True, base_precision="int8"),
    "lean: offloaded and streamed": Plan("attention_output", offload_activations=True, stream_weights=2),
}


class Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that sums the FLOPs of matrix products and attention; torch's own counter hooks into modules."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.total += attention_flops(args[0])
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.total += attention_flops(args[1]) * 5 // 2
        return result


def attention_flops(query: torch.Tensor) -> int:
    """Return the FLOPs of two products for a query [1,heads,S,head_dim]; the backward pass makes five."""
    batch, heads, tokens, head_dim = query.shape
    return 4 * batch * heads * tokens**2 * head_dim


def count_bytes() -> list[dict[str, Any]]:
    """Return peak, loaded and kept GiB of every plan at the published sizes, LoRA rank 64, one clip."""
    rows = []
    for variant, bucket in (
        ("2b", Bucket(49, 480, 720)),
        ("5b", Bucket(49, 480, 720)),
        ("1.5-5b", Bucket(81, 768, 1360)),
    ):
        conventions = published_conventions(variant)
        train = Train(output_dir=Path("unused"), lora_rank=64, lora_alpha=64)
        for name, plan in PLANS.items():
            found = predict_peak(PUBLISHED[variant], conventions, train, plan, [bucket], torch.bfloat16)
            sizes = {"peak": found.peak, "loaded": found.loaded, "kept": found.kept}
            rows.append({"model": variant, "clip": str(bucket), "plan": name} | {k: v / GIB for k, v in sizes.items()})
    return rows


def count_flops() -> list[dict[str, Any]]:
    """Return FLOPs of one forward and backward pass of the small model, as multiples of its forward pass."""
    rows = []
    for name in ("full", "attention_output", "block_input"):
        transformer, conventions = build_small(torch.float32, CPU)
        pack = make_pack(conventions, [Bucket(9, 96, 160)], torch.float32, CPU)
        engine = open_engine(transformer, PLANS[name], CPU)
        counts = []
        for backward in (False, True):
            with Flops() as counter, torch.set_grad_enabled(backward):
                velocities = predict(transformer, pack, conventions, engine)
                if backward:
                    torch.autograd.backward([velocity.square().mean() for velocity in velocities])
            counts.append(counter.total)
        rows.append({"plan": name, "forward": counts[0], "step": counts[1], "step_per_forward": counts[1] / counts[0]})
    return rows


def time_ratios(num_pairs: int) -> list[dict[str, Any]]:
    """Return seconds of a step in each plan over those of "full", from interleaved pairs, with the A/A control."""
    transformer, conventions = build_small(torch.float32, CPU)
    pack = make_pack(conventions, [Bucket(9, 96, 160)], torch.float32, CPU)

    def step(engine: Engine) -> float:
        transformer.zero_grad()
        started = time.perf_counter()
        velocities = predict(transformer, pack, conventions, engine)
        torch.autograd.backward([velocity.square().mean() for velocity in velocities])
        return time.perf_counter() - started

    plain = Engine()
    arms: dict[str, Callable[[], float]] = {
        "full again (A/A)": lambda: step(plain),
        "attention_output": lambda: step(Engine("attention_output")),
        "block_input": lambda: step(Engine("block_input")),
    }
    rows = []
    for name, arm in arms.items():
        arm(), step(plain)  # warm
        ratios = []
        for _ in range(num_pairs):  # ABBA, so that a drift affects both
            first, second, third, fourth = step(plain), arm(), arm(), step(plain)
            ratios.append((second + third) / (first + fourth))
        rows.append({"plan": name, **record.interval(ratios), "ratios": ratios})
    return rows


def as_markdown(found: dict[str, Any]) -> str:
    """Return the three tables."""
    sizes, flops, ratios = found["simulated_gib"], found["flops"], found["ratios"]
    return "\n".join(
        [
            "Stage 2's memory engine. GiB with a rank-64 adapter in bf16, simulated:\n",
            record.table(list(sizes[0]), [list(row.values()) for row in sizes]),
            "Matrix-product FLOPs of forward and backward pass, over those of the forward pass alone:\n",
            record.table(("plan", "times"), [[row["plan"], row["step_per_forward"]] for row in flops]),
            "Seconds of a step of the small model on one CPU thread, over those of `full`:\n",
            record.table(("plan", "median", "low", "high"), [list(row.values())[:4] for row in ratios]),
            record.describe(found["circumstances"]),
        ]
    )


def main() -> None:
    """Measure, write the results and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        "circumstances": record.circumstances(),
        "simulated_gib": count_bytes(),
        "flops": count_flops(),
        "ratios": time_ratios(arguments.pairs),
    }
    text = as_markdown(found)
    record.write("cpu-memory", found, text)
    print(text)


if __name__ == "__main__":
    main()

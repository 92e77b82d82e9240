"""The choice of a memory plan: the fastest that the config allows and that fits the card."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from diffusers import CogVideoXTransformer3DModel

from shared import console
from shared.config import Config, Train
from shared.errors import UsageError
from shared.model.conventions import Conventions
from shared.model.geometry import Bucket
from train.distributed import all_gather
from train.memory.simulation import predict_peak
from train.transformer.compiled import compiled_kernels
from train.transformer.engine import Plan

GIB = 2**30
RESERVED_PER_ALLOCATED = 1.15
"""What the CUDA allocator reserves for a byte allocated, from published runs beside simulated ones (1.13 to 1.15)."""

PREFERENCE = (
    Plan("full"),
    Plan("attention_output"),
    Plan("attention_output", offload_activations=True),
    Plan("attention_output", offload_activations=True, stream_weights=2),
)
"""From the fastest to the leanest. The second is filled up with blocks that keep `full`."""


def choose_plans(
    config: Config,
    transformer: CogVideoXTransformer3DModel,
    conventions: Conventions,
    buckets: Sequence[Bucket],
    device: torch.device,
) -> list[Plan]:
    """Return the first plan of the preference that the config allows and that fits, then the leaner ones; print why.

    On a CPU it is the first that the config allows, whatever memory it takes. Raises `UsageError` if the fields
    contradict each other, or if nothing can be compiled here and the config wants it.
    """
    plans = candidates(config, device)
    if any(plan.compile for plan in plans) and not _compiles(config, device, transformer.dtype):
        plans = [replace(plan, compile=False) for plan in plans]
    if len(plans) == 1 or device.type == "cpu":
        return plans[:1]
    pack = largest_pack(config.train, conventions, buckets)
    free = min(all_gather(torch.cuda.mem_get_info(device)[0]))  # so that all processes choose alike

    def peak(plan: Plan) -> int:
        return predict_peak(transformer.config, conventions, config.train, plan, pack, transformer.dtype).peak

    for plan in plans:
        needed = int(peak(plan) * RESERVED_PER_ALLOCATED)
        if needed <= free:
            break
    plans = plans[plans.index(plan) :]
    fillable = plan.activations == "attention_output" and not plan.offload_activations
    if needed <= free and fillable and config.memory.full_blocks == "auto":
        plan, needed = fill(plan, needed, free, transformer.config.num_layers, peak)
    why = f"predicted {needed / GIB:.2f} GiB for {describe_pack(pack)}, {free / GIB:.2f} GiB free on {device}"
    if needed > free:
        why += "; this may not fit, and is the leanest that [memory] leaves"
    console.say(f"memory: {describe(plan)} ({why})")
    return list(dict.fromkeys((plan, *plans)))


def fill(plan: Plan, needed: int, free: int, num_layers: int, peak: Callable[[Plan], int]) -> tuple[Plan, int]:
    """Return the plan with as many full blocks as fit into `free` bytes, and what it needs; `needed` is without any.

    From two full blocks on, each costs the same.
    """
    if num_layers <= 3:
        return plan, needed
    two, three = (peak(replace(plan, full_blocks=count)) for count in (2, 3))
    more = (int(free / RESERVED_PER_ALLOCATED) - two) // (three - two)
    if more < 0:
        return plan, needed
    more = min(more, num_layers - 3)  # all of them would be the plan "full"
    return replace(plan, full_blocks=2 + more), int((two + more * (three - two)) * RESERVED_PER_ALLOCATED)


def candidates(config: Config, device: torch.device) -> list[Plan]:
    """Return the plans that the fields of [memory] allow, in order of preference.

    Raises `UsageError` if they allow none.
    """
    memory, train = config.memory, config.train
    fixed = {name: value for name, value in memory.model_dump().items() if value != "auto" and name in Plan.__slots__}
    if train.gradient_checkpointing and fixed.setdefault("activations", "block_input") != "block_input":
        raise UsageError(
            f"memory.activations = {memory.activations!r}: train.gradient_checkpointing = true means 'block_input'; "
            "leave one of them out"
        )
    if memory.base_precision != "model" and train.use_dora:
        raise UsageError(
            f"memory.base_precision = {memory.base_precision!r}: train.use_dora needs the norms of exact weights; "
            "use 'model'"
        )
    fixed.setdefault("compile", device.type == "cuda" and importlib.util.find_spec("triton") is not None)
    return list(dict.fromkeys(replace(plan, **fixed) for plan in PREFERENCE))


def _compiles(config: Config, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the compiled kernels run here; compilers are missing from many images."""
    try:
        compiled_kernels().try_on(device, dtype)
    except Exception as error:  # dynamo, inductor and triton raise errors of many kinds
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        if config.memory.compile is True:
            raise UsageError(f"memory.compile = true: compiling fails here ({reason}); use 'auto' or false") from None
        console.say(f"memory: not compiled, because compiling fails here ({reason})")
        return False
    return True


def largest_pack(train: Train, conventions: Conventions, buckets: Sequence[Bucket]) -> list[Bucket]:
    """Return as many clips of the largest bucket as one pack may hold."""
    bucket = max(buckets, key=conventions.num_tokens)
    clips = train.max_tokens_per_pack // conventions.num_tokens(bucket)
    return [bucket] * max(1, min(clips, train.global_batch_size))


def describe_pack(pack: Sequence[Bucket]) -> str:
    """Return the bucket and the number of clips in words."""
    return f"{len(pack)} x {pack[0]}" if len(pack) > 1 else str(pack[0])


def describe(plan: Plan) -> str:
    """Return the plan in words."""
    words = [f"activations {plan.activations}" + (" in host memory" if plan.offload_activations else "")]
    if plan.full_blocks:
        words.append(f"{plan.full_blocks} blocks full")
    if plan.stream_weights:
        words.append(f"{plan.stream_weights} blocks' weights on the card at a time")
    if plan.base_precision != "model":
        words.append(f"{plan.base_precision} base")
    if plan.compile:
        words.append("compiled")
    return ", ".join(words)

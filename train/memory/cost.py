"""Memory and time of training on a card that is not there, for `precog plan --card`.

Memory is simulated. Time is the number of FLOPs of the frozen layers, over the card's published rate times one
efficiency. The adapter, copies to and from host memory, optimizer and data loading are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from shared import console
from shared.cache.storage import open_storage
from shared.cache.view import read_view
from shared.cards import Card
from shared.config import Config
from shared.device import DTYPES
from shared.errors import CacheError, UsageError
from shared.model.conventions import Conventions, read_conventions, refusal
from shared.model.geometry import Bucket
from shared.model.pretrained import pretrained_config, pretrained_dtype
from train.data.order import num_train_steps
from train.memory.choice import (
    GIB,
    RESERVED_PER_ALLOCATED,
    candidates,
    describe,
    describe_pack,
    largest_pack,
)
from train.memory.simulation import predict_peak
from train.transformer.engine import Activations

CONTEXT_GIB = 0.75
"""Memory that CUDA itself takes."""
EFFICIENCY = 0.4
"""FLOP/s reached, over the published rate. CogVideoX's published times on A100 and H100 reach 0.27 to 0.59."""
SECONDS_BAND = (0.5, 1.5)
"""Expected range of the real seconds over the estimate: the same figures, and room for GeForce cards, whose matrix
products come closer to the published rate. No figure of a GeForce card has been compared."""
LAUNCH_BOUND_SECONDS = 0.1
"""Below this, a step takes longer to launch its kernels than to run them, and the estimate says nothing."""


Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class PlanCost:
    """Cost of training with one memory plan."""

    plan: str
    fits: bool
    reserved_gib: float
    """Simulated memory with the allocator's overhead."""
    seconds_per_step: Range | None
    """Lowest and highest estimate for a mean step; None in fp32 and without a published rate."""
    hours: Range | None
    """Lowest and highest estimate for the run; None also while the number of clips is unknown."""


@dataclass(frozen=True, slots=True)
class TrainingCost:
    """Costs of every plan on one card, from the fastest plan to the leanest."""

    card: str
    work: str
    """Description of the largest pack, the precision and the rank."""
    plans: list[PlanCost]
    takes: str | None
    """The plan that memory = "auto" would take."""


def training_cost(config: Config, card: Card) -> TrainingCost:
    """Estimate every plan that [memory] leaves open: memory for the largest pack, time for the mean clip.

    The clips are those of the view; while stage 1 has not made it, one clip of the largest bucket. Raises `UsageError`
    if [memory] contradicts itself, or no bucket can be trained.
    """
    shape, vae, scheduler = (pretrained_config(config.model, part) for part in ("transformer", "vae", "scheduler"))
    conventions, train = read_conventions(shape, vae, scheduler), config.train
    buckets, source, num_steps = _clips(config, conventions)
    asked = train.mixed_precision
    precision = pretrained_dtype(config.model, "transformer") if asked == "auto" else asked
    width, depth = int(shape["num_attention_heads"]) * int(shape["attention_head_dim"]), int(shape["num_layers"])
    pack = largest_pack(train, conventions, buckets)
    plans = []
    for plan in candidates(config, torch.device("cuda")):
        plan = replace(plan, compile=config.memory.compile is not False)  # the card's machine has a compiler
        found = predict_peak(shape, conventions, train, plan, pack, DTYPES[precision])
        reserved = found.peak * RESERVED_PER_ALLOCATED / GIB
        seconds = hours = None
        if card.tflops and precision != "fp32":
            flops = sum(block_flops(width, conventions.num_tokens(bucket), plan.activations) for bucket in buckets)
            step = train.global_batch_size * depth * flops / len(buckets) / (EFFICIENCY * card.tflops * 1e12)
            seconds = (SECONDS_BAND[0] * step, SECONDS_BAND[1] * step)
            hours = None if num_steps is None else (num_steps * seconds[0] / 3600, num_steps * seconds[1] / 3600)
        plans.append(PlanCost(describe(plan), reserved <= card.gib - CONTEXT_GIB, reserved, seconds, hours))
    work = f"{describe_pack(pack)} ({source}, {precision}, rank {train.lora_rank}), batch {train.global_batch_size}"
    return TrainingCost(card.name, work, plans, next((cost.plan for cost in plans if cost.fits), None))


def block_flops(width: int, tokens: int, activations: Activations) -> float:
    """Return the FLOPs of one frozen block, forward and backward, over a clip of `tokens`, recomputation included.

    Linear layers: 24 d^2 S (query, key, value 6, output 2, feed-forward 8 and 8), as much again backward because the
    frozen base needs no weight gradients, and 16 recomputed. Attention: 4 S^2 d, 2.5 times as much backward.
    """
    again = 0 if activations == "full" else 1
    linear = 24.0 * width**2 * tokens * (2 + again * 16 / 24)
    attention = 4.0 * width * tokens**2 * (3.5 + (activations == "block_input"))
    return linear + attention


def show_cost(cost: TrainingCost) -> None:
    """Print one line per plan, and the choice."""
    rows = []
    for plan in cost.plans:
        words = [f"{plan.reserved_gib:.2f} GiB", "fits" if plan.fits else "does not fit"]
        if plan.seconds_per_step and plan.seconds_per_step[1] < LAUNCH_BOUND_SECONDS:
            words.append(f"under {LAUNCH_BOUND_SECONDS} s a step")
        else:
            times = ((plan.seconds_per_step, "s a step"), (plan.hours, "hours"))
            words += [f"{span[0]:.2g} to {span[1]:.2g} {unit}" for span, unit in times if span is not None]
        rows.append((plan.plan, ", ".join(words)))
    console.table(f"Training on {cost.card}: {cost.work}", rows)
    console.say("Nothing is measured: memory is simulated, times come from FLOPs and published rates.")
    advice = f"No plan fits in {cost.card}; try memory.base_precision, a lower rank or shorter clips."
    console.say(f"memory = auto would take: {cost.takes}" if cost.takes else advice)


def _clips(config: Config, conventions: Conventions) -> tuple[Sequence[Bucket], str, int | None]:
    """Return the buckets of the training clips, their source, and the number of optimizer steps if it is known."""
    train, data = config.train, config.data
    try:
        storage = open_storage(config.precompute.cache, local_cache_gib=config.precompute.local_cache_gib)
        buckets = read_view(storage, data.name).epoch_buckets
    except CacheError:
        wanted = [Bucket(count, *size) for count, size in product(data.frame_buckets, data.resolutions)]
        wanted = [bucket for bucket in wanted if bucket.frames <= data.max_num_frames]
        fitting = [bucket for bucket in wanted if not refusal(conventions, bucket)]
        if not fitting:
            raise UsageError(f"data: {refusal(conventions, wanted[0])}; change the buckets") from None
        return largest_pack(train, conventions, fitting)[:1], "largest bucket of the config", train.max_train_steps
    for bucket in sorted(set(buckets)):
        if reason := refusal(conventions, bucket):
            raise UsageError(f"view {data.name}: {reason}")
    steps = num_train_steps(len(buckets), train.global_batch_size, train.max_train_steps, train.num_train_epochs)
    return buckets, f"largest clip of view {data.name}", steps

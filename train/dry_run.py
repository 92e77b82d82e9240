"""`precog train --dry-run`: open everything that a run opens, take a few steps, and save nothing."""

import statistics
import time
from dataclasses import dataclass
from itertools import pairwise

import torch

from shared import console
from shared.config import Config
from shared.device import peak_memory_bytes
from train.checkpoint.resume import find_start
from train.open_run import announce, open_run
from train.preview import open_previews
from train.run import Run
from train.state import TrainState
from train.step import plan_batch, read_batch, take_gradients

NUM_STEPS = 3
"""Steps of each batch; the first one warms up and is not timed."""
MAX_SEARCHED_STEPS = 2000
"""Steps among which the largest and the typical batch are searched, within one epoch."""


@dataclass(frozen=True, slots=True)
class MeasuredBatch:
    """Time and memory of one batch of the run."""

    tokens: int
    """Text and video tokens of the global batch."""
    largest_pack_tokens: int
    """Tokens of its largest pack on any rank."""
    seconds: float
    """Median seconds per optimizer step, without reading."""
    read_seconds: float
    """Seconds to read the batch; a run reads while it trains."""
    peak_memory_bytes: int
    """Most memory of this process so far: allocated by torch on a GPU, resident on a CPU."""


@dataclass(frozen=True, slots=True)
class DryRun:
    """Result of a dry run with this number of processes."""

    device: str
    attention: str
    resumes_at_step: int
    """Step of the checkpoint that a run would resume; 0 at the beginning."""
    num_steps: int
    """Steps at the end of the run."""
    largest: MeasuredBatch
    typical: MeasuredBatch
    hours: float
    """Hours of training steps left, without evaluations, previews and saves."""


def dry_run(config: Config) -> DryRun:
    """Measure a few steps of the largest and of a typical batch; the run folder is neither written nor locked.

    Raises every `PrecogError` that a run raises before or in its first steps.
    """
    run = open_run(config)
    if config.train.preview_steps:
        open_previews(run)
    state = TrainState(run, find_start(run))
    announce(run)
    first = state.step
    sizes = batch_sizes(run)
    largest = measure_batch(run, state, *max(sizes, key=lambda size: size[2]))
    typical = measure_batch(run, state, *sorted(sizes, key=lambda size: size[1])[len(sizes) // 2])
    run.accelerator.end_training()
    hours = (run.num_steps - first) * max(typical.seconds, typical.read_seconds) / 3600
    return DryRun(str(run.accelerator.device), run.engine.attention, first, run.num_steps, largest, typical, hours)


def batch_sizes(run: Run) -> list[tuple[int, int, int]]:
    """Return (step from 0, tokens of the batch, tokens of its largest pack) of the first epoch's steps."""
    per_epoch = -(-len(run.dataset.places) // run.config.train.global_batch_size)
    sizes = []
    for step in range(min(run.num_steps, per_epoch, MAX_SEARCHED_STEPS)):
        _, tokens, ranks = plan_batch(run, step)
        packs = [sum(tokens[index] for index in pack) for rank in ranks for pack in rank]
        sizes.append((step, sum(tokens), max(packs)))
    return sizes


def measure_batch(run: Run, state: TrainState, step: int, tokens: int, largest_pack_tokens: int) -> MeasuredBatch:
    """Train the batch of `step` (from 0) a few times; raises `NonFiniteError` as a run does."""
    device = run.accelerator.device
    times = [time.perf_counter()]
    batch = read_batch(run, step)
    times.append(time.perf_counter())
    for _ in range(NUM_STEPS):
        take_gradients(run, batch.packs, stopping=False)
        state.update()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter())
    read_seconds, _, *seconds = (end - begin for begin, end in pairwise(times))
    peak = peak_memory_bytes(device)
    return MeasuredBatch(tokens, largest_pack_tokens, statistics.median(seconds), read_seconds, peak)


def show(result: DryRun) -> None:
    """Print the result as a table."""
    rows = [
        (
            name,
            f"{batch.seconds:.3g} s a step, {console.bytes_text(batch.peak_memory_bytes)} peak, "
            f"{batch.read_seconds:.2g} s to read, {batch.tokens} tokens, largest pack {batch.largest_pack_tokens}",
        )
        for name, batch in (("largest batch", result.largest), ("typical batch", result.typical))
    ]
    rows.append(("steps left", f"{result.num_steps - result.resumes_at_step} of {result.num_steps}"))
    rows.append(("time left", f"{result.hours:.3g} hours on {result.device}, without evaluations and previews"))
    console.table("Dry run: nothing is refused, nothing was written", rows)

"""`precog train --dry-run`: open everything that a run opens, take a few steps, and save nothing."""

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from shared import console
from shared.config import Config
from shared.device import peak_memory_bytes
from train.batch import plan_batch, read_batch
from train.checkpoint.resume import find_start
from train.open_run import announce, open_run
from train.preview import open_previews
from train.run import Run
from train.state import TrainState
from train.step import require_finite, step_gradients

STEPS = 3
"""Steps of each batch; the first one warms up and is not timed."""
SEARCHED_STEPS = 2000
"""Steps of the run among which the largest and the typical batch are sought, at most one epoch."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One batch of the run, as it was trained."""

    step: int
    """Optimizer step (from 1) whose batch it is."""
    tokens: int
    """Text and video tokens of the global batch."""
    largest_pack_tokens: int
    seconds: float
    """Median seconds per optimizer step, without reading."""
    read_seconds: float
    """Seconds to read the batch; a run reads while it trains."""
    peak_memory_bytes: int
    """Most memory this process has held so far: allocated by torch on a GPU, resident on a CPU."""


@dataclass(frozen=True, slots=True)
class DryRun:
    """The result of a dry run, for the machine with this number of processes."""

    device: str
    attention: str
    resumes_at_step: int
    """Step of the checkpoint that a run would resume; 0 at the beginning."""
    num_steps: int
    """Steps at the end of the run."""
    largest: Measured
    typical: Measured
    hours: float
    """Hours of training steps left, without evaluations, previews and saves."""

    def as_json(self) -> dict[str, Any]:
        """Return the result for `--json`."""
        return asdict(self)


def dry_run(config: Config) -> DryRun:
    """Measure three steps of the largest and of a typical batch; the run folder is neither written nor locked.

    Raises what the run itself would raise: `UsageError`, `DataError`, `CacheError`, `NonFiniteError`.
    """
    run = open_run(config)
    if config.train.preview_steps:
        open_previews(run)
    state = TrainState(run)
    start = find_start(run)
    if start.checkpoint is not None:
        state.resume(start.checkpoint)
    announce(run)
    first = state.step
    typical, largest = choose_steps(run)
    found = {step: measure_step(run, state, step) for step in dict.fromkeys((largest, typical))}
    left = run.num_steps - first
    hours = left * max(found[typical].seconds, found[typical].read_seconds) / 3600
    return DryRun(
        str(run.accelerator.device), run.engine.attention, first, run.num_steps, found[largest], found[typical], hours
    )


def choose_steps(run: Run) -> tuple[int, int]:
    """Return the steps (from 0) with the median of tokens and with the largest pack of any rank."""
    per_epoch = -(-len(run.dataset.rows) // run.config.train.global_batch_size)
    sizes = []
    for step in range(min(run.num_steps, per_epoch, SEARCHED_STEPS)):
        _, tokens, ranks = plan_batch(run, step)
        pack = max(sum(tokens[index] for index in pack) for packs in ranks for pack in packs)
        sizes.append((sum(tokens), pack, step))
    typical = sorted(sizes)[len(sizes) // 2]
    largest = max(sizes, key=lambda size: (size[1], size[0]))
    return typical[2], largest[2]


def measure_step(run: Run, state: TrainState, step: int) -> Measured:
    """Train the batch of `step` (from 0) a few times; raises `NonFiniteError` as a run does."""
    device, seconds = run.accelerator.device, []
    began = time.perf_counter()
    batch = read_batch(run, step)
    read_seconds = time.perf_counter() - began
    for _ in range(STEPS):
        began = time.perf_counter()
        losses, result = step_gradients(
            run.transformer,
            batch.packs,
            run.conventions,
            run.config.train,
            run.engine,
            run.accelerator,
            stopping=False,
        )
        require_finite(result, batch.packs, losses)
        state.update()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    _, tokens, ranks = plan_batch(run, step)
    pack = max(sum(tokens[index] for index in pack) for packs in ranks for pack in packs)
    median = statistics.median(seconds[1:])
    return Measured(step + 1, sum(tokens), pack, median, read_seconds, peak_memory_bytes(device))


def show(result: DryRun) -> None:
    """Print the result as a table."""

    def words(measured: Measured) -> str:
        memory = console.bytes_text(measured.peak_memory_bytes)
        pack = f"{measured.tokens} tokens, largest pack {measured.largest_pack_tokens}"
        return f"{measured.seconds:.3g} s a step, {memory} peak, {measured.read_seconds:.2g} s to read ({pack})"

    rows = [("largest batch", words(result.largest)), ("typical batch", words(result.typical))]
    rows.append(("steps left", f"{result.num_steps - result.resumes_at_step} of {result.num_steps}"))
    rows.append(("time left", f"{result.hours:.3g} hours on {result.device}, without evaluations and previews"))
    console.table("Dry run: nothing is refused, nothing was written", rows)

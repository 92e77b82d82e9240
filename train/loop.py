"""Stage 2, read from top to bottom: open the run, find where it stands, and step.

A run's position is one number, the optimizer steps it has done; everything else follows from the config and the view.
"""

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from shared import console
from shared.config import Config, save_config
from shared.device import peak_memory_bytes
from shared.errors import UsageError
from shared.fingerprint import Json
from shared.run_folder import EXPORT, preview_file
from shared.signals import StopSignal
from train.batch import Work, read_work
from train.checkpoint.files import prune_checkpoints, save_checkpoint
from train.checkpoint.identity import base_key
from train.checkpoint.resume import Start, find_start
from train.distributed import gather, on_main
from train.evaluate import base_held_out_loss, held_out_loss
from train.export import BASE_KEY, CONFIG_KEY, STEPS_KEY, VIEW_KEY, config_key, export_adapter
from train.metrics import Metrics, finish_metrics, open_tracker, track
from train.preview import Previews, open_previews, write_preview
from train.run import Run, announce, open_run
from train.state import Learner
from train.step import StepResult, require_finite, step_gradients

logger = logging.getLogger(__name__)


def train(config: Config, stop: StopSignal) -> None:
    """Run the experiment to its last step, from its newest checkpoint if there is one.

    Raises `CacheError` if the cache does not fit, `NonFiniteError` before an update that would spoil the adapter,
    `Preempted` after a signal, with a checkpoint saved.

    A sample that one rank cannot read (missing, damaged, unreachable) ends that rank before the step, with the sample's
    name; the others wait for its gradients until the launcher (torchrun, accelerate) sees that and ends them.
    """
    run = open_run(config)
    with claimed(config.train.output_dir) if run.accelerator.is_main_process else nullcontext():
        run_steps(run, stop)


def run_steps(run: Run, stop: StopSignal) -> None:
    """From the newest checkpoint to the export."""
    settings, accelerator = run.config.train, run.accelerator
    previews = open_previews(run) if settings.preview_steps else None
    learner = Learner(run)
    start = find_start(run)
    if start.checkpoint is not None:
        learner.resume(start.checkpoint)
    accelerator.wait_for_everyone()
    metrics = open_metrics(run, start) if accelerator.is_main_process else None
    open_tracker(accelerator, run.config)
    if lacks_evaluation(run, learner, metrics) and not evaluate(run, learner, metrics, stop):
        leave(run, learner, stop)
    if previews is not None and lacks_previews(run, learner, previews) and not preview(run, learner, previews, stop):
        leave(run, learner, stop)

    with ThreadPoolExecutor(1) as reader:
        upcoming = reader.submit(read_work, run, learner.step)
        while learner.step < run.num_steps:
            started = time.perf_counter()
            work = upcoming.result()
            waited_seconds = time.perf_counter() - started
            if learner.step + 1 < run.num_steps:
                upcoming = reader.submit(read_work, run, learner.step + 1)

            losses, result = step_gradients(
                run.transformer, work.packs, run.conventions, settings, run.engine, accelerator, stopping=stop.requested
            )
            require_finite(result, work.packs, losses)
            learning_rate = learner.learning_rate
            learner.update()

            if metrics is not None:
                line = describe_step(run, learner.step, work, result, learning_rate)
                line |= {"seconds": time.perf_counter() - started, "data_wait_seconds": waited_seconds}
                track(accelerator, metrics.write(line))
            checkpoint = partial(save, run, learner, start.state)
            if saving := result.stopping or _is_due(run, learner.step, settings.checkpointing_steps):
                on_main(checkpoint)  # before what may take long and be cut off
            if result.stopping:
                leave(run, learner, stop)
            if is_evaluated(run, learner.step) and not evaluate(run, learner, metrics, stop):
                if not saving:
                    on_main(checkpoint)
                leave(run, learner, stop)
            due = previews if _is_multiple(learner.step, settings.preview_steps) else None
            if due is not None and not preview(run, learner, due, stop):
                if not saving:
                    on_main(checkpoint)
                leave(run, learner, stop)

    if accelerator.is_main_process:
        finish_metrics(settings.output_dir, export(run, learner, start))
    accelerator.end_training()


def open_metrics(run: Run, start: Start) -> Metrics:
    """Say what is about to be trained, and from where; on rank 0."""
    folder, checkpoint = run.config.train.output_dir, start.checkpoint
    save_config(run.config, folder / "config.toml")
    announce(run)
    if checkpoint is not None:
        console.say(f"going on from {checkpoint.path} at step {checkpoint.step} of {run.num_steps}")
    metrics = Metrics(folder, 0 if checkpoint is None else checkpoint.step, run.num_steps)
    metrics.header()
    return metrics


def describe_step(run: Run, step: int, work: Work, result: StepResult, learning_rate: float) -> dict[str, Any]:
    """The step's object of metrics.jsonl, but for what was timed and evaluated."""
    line: dict[str, Any] = {
        "step": step,
        "loss": result.loss,
        "lr": learning_rate,
        "grad_norm": result.grad_norm,
        "samples": run.config.train.global_batch_size,
        "tokens": work.tokens,
        "packs": work.num_packs,
        "peak_memory_bytes": peak_memory_bytes(run.accelerator.device),
    }
    if run.config.train.log_clips:
        line |= {"clips": work.clips, "timesteps": work.timesteps}
    return line


def is_evaluated(run: Run, step: int) -> bool:
    """Whether the step has a held-out loss."""
    return bool(run.held_out.rows) and _is_due(run, step, run.config.train.validation_steps)


def lacks_evaluation(run: Run, learner: Learner, metrics: Metrics | None) -> bool:
    """Whether the run goes on from a step that ended before its held-out loss was written; alike on all processes."""
    lacking = metrics is not None and metrics.last.get("step") == learner.step and "held_out_loss" not in metrics.last
    return is_evaluated(run, learner.step) and any(gather(lacking))


def evaluate(run: Run, learner: Learner, metrics: Metrics | None, stop: StopSignal) -> bool:
    """Add the held-out loss to the step's line, the first time with that of the base model alone, which never changes.

    All processes take part. False, with nothing added, if a signal came to one of them.
    """
    with learner.evaluated():
        losses = {"held_out_loss": held_out_loss(run, lambda: stop.requested)}
    if any(gather(metrics is not None and metrics.base_held_out_loss is None)):
        losses["base_held_out_loss"] = base_held_out_loss(run, lambda: stop.requested)
    taken = {name: loss for name, loss in losses.items() if loss is not None}
    if taken.keys() < losses.keys():
        return False
    if metrics is not None:
        metrics.add(taken)
        track(run.accelerator, {"step": learner.step, **taken})
    return True


def leave(run: Run, learner: Learner, stop: StopSignal) -> None:
    """End all processes, one of which has had a signal; raises `Preempted`."""
    run.accelerator.end_training()
    stop.requested = True
    where = run.config.train.output_dir
    stop.check(f"checkpoint saved at step {learner.step} of {run.num_steps} in {where}")


def lacks_previews(run: Run, learner: Learner, previews: Previews) -> bool:
    """Whether the run goes on from a step that ended before all of its previews were made; alike on all processes."""
    train = run.config.train
    if learner.step == 0 or not _is_multiple(learner.step, train.preview_steps):
        return False
    files = (preview_file(train.output_dir, learner.step, number) for number in range(len(previews.prompts)))
    return any(gather(run.accelerator.is_main_process and not all(file.exists() for file in files)))


def preview(run: Run, learner: Learner, previews: Previews, stop: StopSignal) -> bool:
    """Make the step's previews; False if a signal came to one of the processes."""

    def make(number: int) -> None:
        with learner.evaluated():
            write_preview(run, previews, number, learner.step, stopped=lambda: stop.requested)

    for number in range(len(previews.prompts)):  # one at a time, so that no rank waits for many
        on_main(partial(make, number))
        if any(gather(stop.requested)):
            return False
    return True


def save(run: Run, learner: Learner, state: dict[str, Json]) -> None:
    """Write a checkpoint and delete those that are not to be kept."""
    train = run.config.train
    saved = save_checkpoint(train.output_dir, learner.step, learner.tensors(), state)
    prune_checkpoints(train.output_dir, train.checkpoints_total_limit, saved)


def export(run: Run, learner: Learner, start: Start) -> Path:
    """Write the finished adapter; the path."""
    config = run.config
    provenance = {
        CONFIG_KEY: config_key(config),
        VIEW_KEY: run.view.hash,
        BASE_KEY: base_key(run.base, start.base),
        STEPS_KEY: str(learner.step),
    }
    with learner.evaluated():
        return export_adapter(run.transformer, config.train, config.train.output_dir / EXPORT, provenance)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the run folder and lock it; the kernel unlocks it if this process dies.

    Raises `UsageError` if another process trains in it or it cannot be made. On a file system without locks, two
    processes in one folder are not noticed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"train.output_dir = {str(folder)!r}: cannot be made ({error.strerror})") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"train.output_dir = {str(folder)!r}: another process is training in this folder"
            raise UsageError(message) from None
        except OSError:
            logger.warning("%s: no locks here; see that only one process trains in it", folder)
        yield
    finally:
        os.close(descriptor)


def _is_due(run: Run, step: int, interval: int) -> bool:
    """Every `interval` steps, and at the end."""
    return step == run.num_steps or _is_multiple(step, interval)


def _is_multiple(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0

"""Stage 2, read from top to bottom: open the run, find its checkpoint, and alternate maintenance and training steps.

A run's position is one number, the optimizer steps done; everything else follows from the config and the view.
"""

import fcntl
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from shared import console
from shared.atomic_files import make_folder
from shared.config import Config
from shared.config_file import save_config
from shared.device import peak_memory_bytes
from shared.errors import Preempted, UsageError
from shared.model.adapters import BASE_KEY, CONFIG_KEY, STEPS_KEY, VIEW_KEY
from shared.model.pretrained import base_key
from shared.run_folder import BEST, EXPORT, add_event
from shared.signals import StopSignal
from train.checkpoint.files import prune_checkpoints, save_checkpoint
from train.checkpoint.resume import find_start, is_finished
from train.data.dataset import clip_label
from train.distributed import all_gather, broadcast, on_rank_0, peers_answer
from train.evaluate import QUANTILES, held_out_loss
from train.events import record_start, recorded
from train.export import adapter_header, config_key, export_adapter
from train.metrics import Metrics, finish_metrics, open_tracker, track
from train.open_run import announce, open_run, start_processes
from train.preview import PreviewPrompt, open_previews, write_previews
from train.run import Run
from train.state import TrainState
from train.step import Batch, prefetch_batches, take_gradients

logger = logging.getLogger(__name__)


@peers_answer()
def train(config: Config, stop: StopSignal) -> None:
    """Run the experiment to its last step, from its newest checkpoint if there is one; nothing if it is finished.

    Raises `CacheError` if the cache does not fit, `NonFiniteError` before an update with a loss that is not finite,
    `Preempted` after a signal, with a checkpoint saved. A rank that cannot read a sample ends with the sample's name
    before the step; the other ranks wait until the launcher (torchrun, accelerate) ends them.
    """
    accelerator = start_processes(config.train)
    folder = config.train.output_dir
    if broadcast(on_rank_0(lambda: is_finished(config))):
        console.say(f"{folder}: the run is finished; remove {folder / EXPORT} to export again")
        accelerator.end_training()
        return
    run = open_run(config)
    if not accelerator.is_main_process:
        run_steps(run, stop)
        return
    with claimed(folder), recorded(folder):
        run_steps(run, stop)


@peers_answer()  # before the error is recorded
def run_steps(run: Run, stop: StopSignal) -> None:
    """Train from the newest checkpoint to the export."""
    train, accelerator = run.config.train, run.accelerator
    prompts = open_previews(run) if train.preview_steps else []
    state = TrainState(run, find_start(run))
    metrics = on_rank_0(lambda: open_metrics(run, state))
    open_tracker(accelerator, run.config)

    stopping = any(all_gather(stop.requested))
    with closing(prefetch_batches(run, state.step)) as batches, metrics or nullcontext():
        while True:
            # Maintenance. The checkpoint comes first, because a signal or a fault may end what follows.
            if is_due(run, state.step, train.checkpointing_steps):
                save(run, state, metrics)
            stopping = stopping or not evaluate(run, state, metrics, stop)
            stopping = stopping or not make_previews(run, state, prompts, stop)
            ended = state.step == run.num_steps or has_stalled(run, state, metrics)
            if stopping or ended:
                save(run, state, metrics)
            if stopping:
                accelerator.end_training()
                raise stopped(run, state.step)
            if ended:
                break

            # One training step.
            stopping = take_step(run, state, batches, metrics, stop)

    if metrics is not None:
        export(run, state, train.output_dir / EXPORT)
        add_event(train.output_dir, "finished", step=state.step)
        finish_metrics(train.output_dir)
    accelerator.end_training()


def stopped(run: Run, step: int) -> Preempted:
    """Return the error after a signal, which says how to resume."""
    train = run.config.train
    if step == 0:
        return Preempted("stopped by a signal before the first step; the same command starts again")
    named = train.resume_from_checkpoint != "latest"  # that checkpoint is no longer the newest
    again = "resume with train.resume_from_checkpoint=latest" if named else "the same command resumes"
    where = f"step {step} of {run.num_steps} in {train.output_dir}"
    return Preempted(f"stopped by a signal: checkpoint saved at {where}; {again}")


def take_step(run: Run, state: TrainState, batches: Iterator[Batch], metrics: Metrics | None, stop: StopSignal) -> bool:
    """Take one optimizer step and write its line of metrics.jsonl; True if a rank got a signal."""
    started = time.perf_counter()
    batch = next(batches)
    waited_seconds = time.perf_counter() - started
    result = take_gradients(run, batch.packs, stopping=stop.requested)
    learning_rate = state.learning_rate
    state.update()
    if metrics is not None:
        line: dict[str, Any] = {
            "step": state.step,
            "loss": result.loss,
            "lr": learning_rate,
            "grad_norm": result.grad_norm,
            "samples": run.config.train.global_batch_size,
            "tokens": batch.tokens,
            "packs": batch.num_packs,
            "peak_memory_bytes": peak_memory_bytes(run.accelerator.device),
            "seconds": time.perf_counter() - started,
            "data_wait_seconds": waited_seconds,
        }
        if run.config.train.log_clips:
            line |= {"clips": batch.clips, "timesteps": batch.timesteps}
        track(run.accelerator, metrics.write(line))
    return result.stopping


def is_due(run: Run, step: int, interval: int) -> bool:
    """Return True every `interval` steps (never if 0), and at the end of the run."""
    return step == run.num_steps or (interval > 0 and step % interval == 0)


def open_metrics(run: Run, state: TrainState) -> Metrics:
    """Save the config, print what is about to be trained from which step, and open the metrics."""
    folder, checkpoint = run.config.train.output_dir, state.start.checkpoint
    save_config(run.config, folder / "config.toml")
    announce(run)
    if checkpoint is not None:
        console.say(f"resuming from {checkpoint.path} at step {checkpoint.step} of {run.num_steps}")
    record_start(run, state.step)
    return Metrics(folder, state.step, run.num_steps, run.config.train.log_steps)


def save(run: Run, state: TrainState, metrics: Metrics | None) -> None:
    """Save a checkpoint unless this step has one, and delete old ones; a collective."""
    train = run.config.train

    def write() -> None:
        assert metrics is not None
        metrics.sync()
        header = adapter_header(train) | provenance(run, state)
        saved = save_checkpoint(train.output_dir, state.step, state.tensors(), state.start.state, header)
        prune_checkpoints(train.output_dir, train.checkpoints_total_limit, saved)

    if state.saved_step != state.step:
        on_rank_0(write)
        state.saved_step = state.step


def evaluate(run: Run, state: TrainState, metrics: Metrics | None, stop: StopSignal) -> bool:
    """Add the held-out loss to the step's line if it is due and missing; a collective.

    The lowest loss so far exports its adapter to `export/best`. The loss of the base model alone, which never changes,
    is added the first time. False, with nothing added, if a rank got a signal.
    """
    if not run.held_out.rows or not is_due(run, state.step, run.config.train.validation_steps):
        return True
    missing = metrics is not None and metrics.last.get("step") == state.step and "held_out_loss" not in metrics.last
    missing_base = metrics is not None and metrics.base_held_out_loss is None
    missing, missing_base = broadcast((missing, missing_base))
    if not missing:
        return True
    found = held_out_loss(run, lambda: stop.requested)
    base = held_out_loss(run, lambda: stop.requested, base=True) if missing_base else None
    if found is None or (missing_base and base is None):
        return False
    loss, cells = found
    line: dict[str, Any] = {"held_out_loss": loss, "held_out_cells": cells}
    if base is not None:
        line |= {"base_held_out_loss": base[0], "base_held_out_cells": base[1]}
        line |= {"held_out_clips": [clip_label(row) for row in run.held_out.rows], "timestep_quantiles": [*QUANTILES]}

    def write() -> None:
        assert metrics is not None
        if metrics.is_lowest(loss):  # before the line, so that an interrupted export is made again
            export(run, state, run.config.train.output_dir / EXPORT / BEST)
        metrics.add(line)
        columns = zip(QUANTILES, zip(*cells, strict=True), strict=True)
        means = {f"held_out_loss_at_{quantile}": sum(column) / len(column) for quantile, column in columns}
        track(run.accelerator, {"step": state.step, **line, **means})

    on_rank_0(write)
    return True


def has_stalled(run: Run, state: TrainState, metrics: Metrics | None) -> bool:
    """Return True after `stop_after_evaluations_without_gain` evaluations above the lowest loss; a collective."""
    limit = run.config.train.stop_after_evaluations_without_gain
    if not limit or not is_due(run, state.step, run.config.train.validation_steps):
        return False
    stalled = broadcast(metrics is not None and metrics.evaluations_without_gain >= limit)
    if stalled and metrics is not None:
        console.say(f"{limit} held-out losses above the lowest one: the run ends at step {state.step}")
    return stalled


def make_previews(run: Run, state: TrainState, prompts: Sequence[PreviewPrompt], stop: StopSignal) -> bool:
    """Make the step's previews if they are due and missing; a collective. False if a rank got a signal."""
    train = run.config.train
    if not prompts or state.step == 0 or state.step % train.preview_steps:
        return True

    again = state.step != state.resumed_step
    return write_previews(run, prompts, state.step, lambda: stop.requested, again=again)


def export(run: Run, state: TrainState, folder: Path) -> None:
    """Write the adapter of this step into `folder`."""
    export_adapter(run.transformer, run.config.train, folder, provenance(run, state))


def provenance(run: Run, state: TrainState) -> dict[str, str]:
    """Return the origin of the weights, for the header of an adapter; a local model's folder is left out."""
    config, model = run.config, run.config.model.pretrained_model_name_or_path
    return {
        CONFIG_KEY: config_key(config),
        VIEW_KEY: run.view.hash,
        BASE_KEY: base_key(run.base, state.start.base_sha256),
        STEPS_KEY: str(state.step),
        "precog_base_model": Path(model).name if Path(model).is_dir() else model,
        "precog_revision": config.model.revision or "",
        "precog_precision": str(run.transformer.dtype).removeprefix("torch."),
        "precog_snr_shift_scale": f"{run.conventions.snr_shift_scale:g}",
        "precog_latents": run.view.latents.recipe,
        "precog_prompts": run.view.prompts.recipe,
        "precog_trigger": config.data.id_token,
    }


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the run folder and lock it within the context; the kernel unlocks it if this process dies.

    Raises `UsageError` if another process trains in the folder or it cannot be made. On a file system without locks,
    two processes in one folder are not noticed.
    """
    where = f"train.output_dir = {str(folder)!r}"
    try:
        make_folder(folder)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"{where}: cannot be made ({error.strerror}); choose another folder") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{where}: another process is training in this folder; choose another folder") from None
        except OSError:
            logger.warning("%s: the file system has no locks; start only one process in this folder", folder)
        yield
    finally:
        os.close(descriptor)

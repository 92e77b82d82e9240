"""Stage 2, read from top to bottom: open the run, find where it stands, and step.

A run's position is one number, the optimizer steps it has done; everything else follows from the config and the view.
"""

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from shared import console
from shared.config import Config, save_config
from shared.device import peak_memory_bytes
from shared.errors import PrecogError, UsageError
from shared.preemption import StopSignal
from shared.run_folder import EXPORT
from train.average import start_average, swapped, update_average
from train.checkpoint import prune_checkpoints, save_checkpoint
from train.data import Example
from train.evaluate import base_held_out_loss, held_out_loss
from train.export import CONFIG_KEY, config_key, export_adapter
from train.extras import averaged
from train.metrics import Metrics, finish_metrics, open_tracker
from train.model import adapter_weights, load_adapter_weights
from train.optimizer import (
    build_optimizer,
    learning_rate_factor,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)
from train.order import divide, global_batch
from train.preview import open_previews, write_preview
from train.resume import find_start
from train.run import Run, announce, open_run
from train.step import require_finite, step_gradients

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
    config, settings, folder = run.config, run.config.train, run.config.train.output_dir
    accelerator, transformer, parameters = run.accelerator, run.transformer, run.parameters
    main, num_steps = accelerator.is_main_process, run.num_steps
    previews = open_previews(run) if settings.preview_steps else None
    optimizer = build_optimizer(parameters, settings)
    learning_rate = learning_rate_factor(settings, num_steps)
    ema = start_average(parameters) if settings.ema_decay else {}
    step = 0
    start = find_start(run)
    checkpoint = start.checkpoint
    if checkpoint is not None:
        load_adapter_weights(transformer, checkpoint.tensors["adapter"])
        load_optimizer_state(optimizer, checkpoint.tensors["optimizer"])
        ema = {name: checkpoint.tensors["ema"][name].to(accelerator.device) for name in ema}
        step = checkpoint.step

    accelerator.wait_for_everyone()
    if main:
        save_config(config, folder / "config.toml")
        announce(run)
        metrics = Metrics(folder, step, num_steps)
        if checkpoint is not None:
            console.say(f"going on from {checkpoint.path} at step {step} of {num_steps}")
        metrics.header()
    open_tracker(accelerator, config)

    def save() -> None:
        tensors = {"adapter": adapter_weights(transformer), "optimizer": optimizer_state(optimizer)}
        if ema:
            tensors["ema"] = ema
        saved = save_checkpoint(folder, step, tensors, start.state)
        prune_checkpoints(folder, settings.checkpoints_total_limit, saved)

    def evaluation_weights() -> AbstractContextManager[None]:
        weights = ema or averaged(optimizer)
        return swapped(parameters, weights) if weights else nullcontext()

    def save_preview(number: int) -> None:
        assert previews is not None
        with evaluation_weights():
            write_preview(run, previews, number, step, stopped=lambda: stop.requested)

    with ThreadPoolExecutor(1) as reader:
        upcoming: Future[Work] = reader.submit(_read_work, run, step)
        while step < num_steps:
            started = time.perf_counter()
            work = upcoming.result()
            waited = time.perf_counter() - started
            if step + 1 < num_steps:
                upcoming = reader.submit(_read_work, run, step + 1)

            rate = settings.learning_rate * learning_rate(step)
            set_learning_rate(optimizer, rate)
            losses, result = step_gradients(
                transformer, work.packs, run.conventions, settings, run.engine, accelerator, stopping=stop.requested
            )
            require_finite(result, work.packs, losses, accelerator)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if ema:
                update_average(ema, parameters, settings.ema_decay, step)

            if main:
                line: dict[str, Any] = {
                    "step": step,
                    "loss": result.loss,
                    "lr": rate,
                    "grad_norm": result.grad_norm,
                    "samples": settings.global_batch_size,
                    "tokens": work.tokens,
                    "packs": work.num_packs,
                    "seconds": time.perf_counter() - started,
                    "data_wait_seconds": waited,
                    "peak_memory_bytes": peak_memory_bytes(accelerator.device),
                }
                if settings.log_clips:
                    line |= {"clips": work.clips, "timesteps": work.timesteps}
                if run.held_out.rows and (step == num_steps or _is_multiple(step, settings.validation_steps)):
                    with evaluation_weights():
                        line["held_out_loss"] = held_out_loss(
                            transformer, run.held_out, run.conventions, len(run.schedule), run.engine
                        )
                    if metrics.base_held_out_loss is None:
                        line["base_held_out_loss"] = base_held_out_loss(
                            transformer, run.held_out, run.conventions, len(run.schedule), run.engine
                        )
                line = metrics.write(line)
                accelerator.log({name: value for name, value in line.items() if isinstance(value, int | float)}, step)
            if previews is not None and _is_multiple(step, settings.preview_steps):
                for number in range(len(previews.prompts)):  # one at a time, so that no rank waits for many
                    on_main(accelerator, partial(save_preview, number))
            if _is_multiple(step, settings.checkpointing_steps) or step == num_steps or result.stopping:
                on_main(accelerator, save)
            if result.stopping and step < num_steps:
                accelerator.end_training()
                stop.requested = True
                stop.check(f"checkpoint saved at step {step} of {num_steps} in {folder}")

    if main:
        provenance = {"precog_view": run.view.hash, "precog_steps": str(step), CONFIG_KEY: config_key(config)}
        with evaluation_weights():
            path = export_adapter(transformer, settings, folder / EXPORT, provenance)
        finish_metrics(folder, path)
    accelerator.end_training()


@dataclass(frozen=True, slots=True)
class Work:
    """One optimizer step's clips, as this rank runs them; all but `packs` is of the global batch."""

    packs: list[list[Example]]
    tokens: int
    num_packs: int
    clips: list[str]
    """Keys of the latents, in order."""
    timesteps: list[int]


def _read_work(run: Run, step: int) -> Work:
    """Cut the global batch into packs and read this rank's; runs in the background, one step ahead."""
    train, accelerator, dataset = run.config.train, run.accelerator, run.dataset
    draws = global_batch(run.view.hash, train.seed, len(dataset.rows), train.global_batch_size, step, run.windows)
    timesteps = dataset.timesteps(draws, step)
    tokens = [dataset.tokens(draw.row) for draw in draws]
    ranks = divide(tokens, run.width, accelerator.num_processes, train.max_tokens_per_pack)
    packs = [
        [
            dataset.example(draws[index], timesteps[index]).to(accelerator.device, run.transformer.dtype)
            for index in pack
        ]
        for pack in ranks[accelerator.process_index]
    ]
    clips = [dataset.rows[draw.row].latent_key for draw in draws]
    return Work(packs, sum(tokens), sum(map(len, ranks)), clips, timesteps)


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


def on_main(accelerator: Accelerator, work: Callable[[], None]) -> None:
    """Run `work` on rank 0 while the others wait; if it fails there, every rank fails, and none waits for ever."""
    failure: BaseException | None = None
    if accelerator.is_main_process:
        try:
            work()
        except Exception as error:
            failure = error
    if accelerator.num_processes > 1:
        (line,) = broadcast_object_list([None if failure is None else str(failure)])
        if line is not None and failure is None:
            raise PrecogError(f"rank 0 failed: {line}")
    if failure is not None:
        raise failure


def _is_multiple(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0

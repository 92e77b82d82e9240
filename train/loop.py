"""Stage 2, read from top to bottom: open the run, find where it stands, and step.

A run's position is one number, the optimizer steps it has done; everything else follows from the config and the view.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from shared import console
from shared.config import Config, save_config
from shared.device import peak_memory_bytes
from shared.preemption import StopSignal
from train.checkpoint import find_checkpoint, prune_checkpoints, save_checkpoint
from train.data import Example
from train.evaluate import base_held_out_loss, held_out_loss
from train.export import export_adapter
from train.metrics import Metrics
from train.model import adapter_weights, load_adapter_weights
from train.optimizer import (
    build_optimizer,
    learning_rate_factor,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)
from train.order import divide, global_batch, num_train_steps
from train.run import Run, announce, open_run, refuse_another_run
from train.step import accumulate_gradients, finish_gradients, require_finite


def train(config: Config, stop: StopSignal) -> None:
    """Run the experiment to its last step, from its newest checkpoint if there is one.

    Raises `CacheError` if the cache does not fit, `NonFiniteError` before an update that would spoil the adapter,
    `Preempted` after a signal, with a checkpoint saved.
    """
    settings, folder = config.train, config.train.output_dir
    run = open_run(config)
    accelerator, transformer, parameters = run.accelerator, run.transformer, run.parameters
    main = accelerator.is_main_process
    num_steps = num_train_steps(
        len(run.dataset.rows), settings.global_batch_size, settings.max_train_steps, settings.num_train_epochs
    )
    optimizer = build_optimizer(parameters, settings)
    learning_rate = learning_rate_factor(settings, num_steps)
    step = 0
    checkpoint = find_checkpoint(folder, settings.resume_from_checkpoint, report=console.say)
    if checkpoint is not None:
        refuse_another_run(checkpoint.state, run.identity, str(checkpoint.path))
        load_adapter_weights(transformer, checkpoint.tensors["adapter"])
        load_optimizer_state(optimizer, checkpoint.tensors["optimizer"])
        step = checkpoint.step

    accelerator.wait_for_everyone()
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / "config.toml")
        announce(run)
        metrics = Metrics(folder, step, num_steps)
        if step:
            console.say(f"going on from {folder}/checkpoint at step {step} of {num_steps}")
        metrics.header()

    def save() -> None:
        accelerator.wait_for_everyone()
        if main:
            tensors = {"adapter": adapter_weights(transformer), "optimizer": optimizer_state(optimizer)}
            save_checkpoint(folder, step, tensors, {"identity": run.identity})
            prune_checkpoints(folder, settings.checkpoints_total_limit)
        accelerator.wait_for_everyone()

    evaluating = main and bool(settings.validation_steps and run.held_out.rows)
    timesteps = len(run.schedule)
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
            losses = accumulate_gradients(transformer, work.packs, run.conventions, settings)
            trained = [parameter for _, parameter in parameters]
            result = finish_gradients(trained, losses, accelerator, settings, stopping=stop.requested)
            require_finite(result, work.packs, losses, accelerator)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1

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
            if evaluating and (step % settings.validation_steps == 0 or step == num_steps):
                line["held_out_loss"] = held_out_loss(transformer, run.held_out, run.conventions, timesteps)
                if step == settings.validation_steps:
                    line["base_held_out_loss"] = base_held_out_loss(
                        transformer, run.held_out, run.conventions, timesteps
                    )
            if main:
                metrics.write(line)
            if step % settings.checkpointing_steps == 0 or step == num_steps or result.stopping:
                save()
            if result.stopping:
                stop.requested = True
                stop.check(f"checkpoint saved at step {step} of {num_steps} in {folder}")

    if main:
        provenance = {"precog_view": run.view.hash, "precog_steps": str(step)}
        console.say(f"adapter: {export_adapter(transformer, settings, folder / 'export', provenance)}")
    accelerator.end_training()


@dataclass(frozen=True, slots=True)
class Work:
    """One optimizer step's clips, as this rank runs them."""

    packs: list[list[Example]]
    tokens: int
    """Of the global batch."""
    num_packs: int
    """Of the global batch."""


def _read_work(run: Run, step: int) -> Work:
    """Cut the global batch into packs and read this rank's; runs in the background, one step ahead."""
    train, accelerator = run.config.train, run.accelerator
    draws = global_batch(run.view.hash, train.seed, len(run.dataset.rows), train.global_batch_size, step)
    tokens = [run.dataset.tokens(draw.row) for draw in draws]
    ranks = divide(tokens, run.width, accelerator.num_processes, train.max_tokens_per_pack)
    packs = [
        [run.dataset.example(draws[index]).to(accelerator.device, run.transformer.dtype) for index in pack]
        for pack in ranks[accelerator.process_index]
    ]
    return Work(packs, sum(tokens), sum(map(len, ranks)))

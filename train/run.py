"""What a run is made of before its first step: processes, view, conventions, data, model."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from diffusers import CogVideoXTransformer3DModel

from shared import console
from shared.cache.collection import read_recipe
from shared.cache.staleness import check_cache
from shared.cache.storage import open_storage
from shared.cache.view import View, read_view
from shared.config import Config, Train
from shared.device import choose_device
from shared.errors import UsageError
from shared.model.conventions import Conventions, read_conventions, refusal
from shared.model.pretrained import Part, pretrained_config, pretrained_part
from shared.tracker import require_tracker
from train.data.dataset import Dataset
from train.data.order import Windows, num_train_steps
from train.export import read_adapter
from train.memory.choice import choose_plan
from train.memory.fidelity import open_quantized_engine
from train.objective import NoiseSchedule, read_schedule
from train.transformer.engine import Engine, open_engine
from train.transformer.load import load_adapter_weights, load_transformer


@dataclass(frozen=True, slots=True)
class Run:
    """Everything a step needs."""

    config: Config
    accelerator: Accelerator
    view: View
    conventions: Conventions
    schedule: NoiseSchedule
    dataset: Dataset
    windows: Windows | None
    """Of the training clips' order."""
    held_out: Dataset
    base: Part
    """The transformer's files."""
    transformer: CogVideoXTransformer3DModel
    engine: Engine
    num_steps: int
    """Optimizer steps, those done before included."""

    @property
    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The adapter's."""
        return [(name, value) for name, value in self.transformer.named_parameters() if value.requires_grad]

    @property
    def width(self) -> int:
        """D of the transformer."""
        return int(self.transformer.config.num_attention_heads * self.transformer.config.attention_head_dim)


def open_run(config: Config) -> Run:
    """Read the view and load the transformer; neither the VAE nor T5 is touched.

    Raises `CacheError` if the cache does not fit the config, `DataError` if it has no clip to train on, `UsageError` if
    a bucket cannot be trained.
    """
    accelerator = start_processes(config.train)
    torch.backends.cuda.matmul.allow_tf32 = config.train.allow_tf32
    storage = open_storage(config.precompute.cache, local_cache_gib=config.precompute.local_cache_gib)
    view = read_view(storage, config.data.name)
    num_steps = num_train_steps(
        len(view.split("train")),
        config.train.global_batch_size,
        config.train.max_train_steps,
        config.train.num_train_epochs,
    )
    latents = read_recipe(storage, view.latents)
    check_cache(config, view, latents, read_recipe(storage, view.prompts))
    conventions, scheduler = agreed_conventions(config, view, latents["vae"]["config"])
    schedule = read_schedule(scheduler)
    dataset, held_out = (
        Dataset(storage, view, split, conventions, schedule, config.train) for split in ("train", "held_out")
    )
    transformer = load_transformer(config, torch.device("cpu")).train()
    if config.train.initial_adapter is not None:
        load_adapter_weights(transformer, read_adapter(transformer, config.train, config.train.initial_adapter))
    buckets = [row.bucket for row in dataset.rows]
    plan = choose_plan(config, transformer, conventions, buckets, accelerator.device)
    if plan.base_precision == "model":
        engine = open_engine(transformer, plan, accelerator.device)
    else:
        example = dataset.fixed_example(0, len(schedule) // 2)
        allowed = config.memory.allow_low_cosine
        engine = open_quantized_engine(
            transformer, plan, accelerator.device, conventions, example, allow_low_cosine=allowed
        )
    return Run(
        config,
        accelerator,
        view,
        conventions,
        schedule,
        dataset,
        dataset.windows(),
        held_out,
        pretrained_part(config.model, "transformer"),
        transformer,
        engine,
        num_steps,
    )


def start_processes(train: Train) -> Accelerator:
    """Place this process, alone or among those that torchrun or accelerate launched, and open the tracker.

    Raises `UsageError` if the tracker is not installed.
    """
    on_cpu = choose_device(train.device).type == "cpu"
    if on_cpu:
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
        if "OMP_NUM_THREADS" not in os.environ:  # the background reader needs a core of its own
            torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))
    require_tracker(train)
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=train.nccl_timeout))
    if train.report_to == "none":
        return Accelerator(cpu=on_cpu, kwargs_handlers=[patience])
    return Accelerator(cpu=on_cpu, log_with=train.report_to, project_dir=train.output_dir, kwargs_handlers=[patience])


def agreed_conventions(config: Config, view: View, vae: dict[str, Any]) -> tuple[Conventions, dict[str, Any]]:
    """The conventions that cache and transformer agree on, and the scheduler's config; only JSON files are read."""
    transformer = pretrained_config(config.model, "transformer")
    scheduler = pretrained_config(config.model, "scheduler")
    conventions = read_conventions(
        transformer, vae, scheduler, drop_learned_positions=config.model.drop_learned_positions
    )
    for bucket in sorted({row.bucket for row in view.split("train")}):
        if reason := refusal(conventions, bucket):
            raise UsageError(f"view {view.name}: {reason}")
    return conventions, scheduler


def announce(run: Run) -> None:
    """What is about to be trained, in a table."""
    train, trainable = run.config.train, sum(parameter.numel() for _, parameter in run.parameters)
    divisor = train.lora_rank**0.5 if train.use_rslora else train.lora_rank
    precision = str(run.transformer.dtype).removeprefix("torch.")
    console.table(
        f"Run {train.output_dir}",
        [
            ("model", run.conventions.name),
            ("precision", f"{precision} base, float32 adapter"),
            ("adapter", f"{trainable:,} weights, scale {train.lora_alpha / divisor:g}"),
            ("attention", run.engine.attention),
            ("clips", f"{len(run.dataset.rows)} to train on, {len(run.held_out.rows)} held out"),
            ("buckets", ", ".join(map(str, sorted({row.bucket for row in run.view.split("train")})))),
            ("shuffled", "whole" if run.windows is None else f"{run.windows.num_shards} shards at a time"),
        ],
    )

"""Opening a run: processes, view, conventions, data, model; most checks come before the weights are loaded."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from shared import console
from shared.cache.collection import read_recipe
from shared.cache.index import read_samples
from shared.cache.staleness import check_cache
from shared.cache.storage import open_storage
from shared.cache.view import read_view
from shared.config import Config, Train
from shared.device import choose_device
from shared.errors import UsageError
from shared.model.conventions import read_conventions, refusal
from shared.model.pretrained import pretrained_config, pretrained_part
from shared.run_folder import require_tracker
from train.data.dataset import Dataset
from train.data.order import num_train_steps
from train.export import read_adapter
from train.memory.choice import choose_plans, largest_pack
from train.memory.fidelity import quantize_base
from train.memory.trial import open_tried
from train.objective import read_schedule
from train.run import Run
from train.transformer.engine import open_engine
from train.transformer.load import load_adapter_weights, load_transformer


def open_run(config: Config) -> Run:
    """Read the view and load the transformer; neither the VAE nor T5 is loaded.

    Raises `CacheError` if the cache does not fit config and checkpoint, `DataError` if the view has no training clip,
    `UsageError` if the checkpoint is incomplete or a bucket cannot be trained.
    """
    train = config.train
    accelerator = start_processes(train)
    torch.backends.cuda.matmul.allow_tf32 = train.allow_tf32
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which deterministic products need
    torch.use_deterministic_algorithms(train.deterministic)
    storage = open_storage(config.precompute.cache, local_cache_gib=config.precompute.local_cache_gib)
    view = read_view(storage, config.data.name)
    buckets = view.epoch_buckets
    num_steps = num_train_steps(len(buckets), train.global_batch_size, train.max_train_steps, train.num_train_epochs)
    latents = read_recipe(storage, view.latents)
    check_cache(config, view, latents, read_recipe(storage, view.prompts))
    shape, scheduler = (pretrained_config(config.model, part) for part in ("transformer", "scheduler"))
    conventions = read_conventions(shape, latents["vae"]["config"], scheduler)
    for bucket in sorted(set(buckets)):
        if reason := refusal(conventions, bucket):
            raise UsageError(f"view {view.name}: {reason}")
    schedule = read_schedule(scheduler)
    stored = {of.folder: read_samples(storage, of.folder) for of in (view.latents, view.prompts)}
    dataset, held_out = (
        Dataset(storage, view, split, conventions, schedule, train, stored) for split in ("train", "held_out")
    )
    transformer = load_transformer(config).train()
    if train.initial_adapter is not None:
        load_adapter_weights(transformer, read_adapter(transformer, train, train.initial_adapter))
    device = accelerator.device
    plans = choose_plans(config, transformer, conventions, buckets, device)
    if plans[0].base_precision != "model":
        quantize_base(transformer, plans[0], device, conventions, dataset.fixed_example(0, len(schedule) // 2))
    trial = None
    if device.type == "cpu":
        engine = open_engine(transformer, plans[0], device)
    else:
        pack = largest_pack(train, conventions, buckets)
        engine, trial = open_tried(transformer, plans, conventions, pack, device)
    return Run(
        config=config,
        accelerator=accelerator,
        view=view,
        conventions=conventions,
        schedule=schedule,
        dataset=dataset,
        windows=dataset.windows(),
        held_out=held_out,
        base=pretrained_part(config.model, "transformer"),
        transformer=transformer,
        engine=engine,
        trial=trial,
        num_steps=num_steps,
    )


def start_processes(train: Train) -> Accelerator:
    """Join the processes that torchrun or accelerate launched; alone without a launcher.

    Raises `UsageError` if the tracker of `train.report_to` is not installed.
    """
    require_tracker(train)
    on_cpu = choose_device(train.device).type == "cpu"
    if on_cpu:
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=train.nccl_timeout))
    tracker = None if train.report_to == "none" else train.report_to
    return Accelerator(cpu=on_cpu, log_with=tracker, project_dir=train.output_dir, kwargs_handlers=[timeout])


def announce(run: Run) -> None:
    """Print a table of what is about to be trained."""
    train, trainable = run.config.train, sum(parameter.numel() for _, parameter in run.parameters)
    divisor = train.lora_rank**0.5 if train.use_rslora else train.lora_rank
    precision = str(run.transformer.dtype).removeprefix("torch.")
    truncated = sum(any(tokens) for tokens in run.dataset.rows.column("truncated_tokens"))
    console.table(
        f"Run {train.output_dir}",
        [
            ("model", run.conventions.name),
            ("precision", f"{precision} base, published in {run.base.dtype()}; float32 adapter"),
            ("adapter", f"{trainable:,} weights, scale {train.lora_alpha / divisor:g}"),
            ("attention", run.engine.attention),
            ("clips", f"{len(run.dataset.rows)} to train on, {len(run.held_out.rows)} held out"),
            ("captions", f"{truncated} clips' captions exceed {run.conventions.text_length} tokens and are truncated"),
            ("buckets", ", ".join(map(str, sorted(set(run.dataset.rows.buckets))))),
            ("shuffled", "all clips" if run.windows is None else f"{run.windows.num_shards} shards at a time"),
        ],
    )

"""Stage 1 from top to bottom: find the clips, encode the prompts, encode the clips, write the table."""

import time
from collections.abc import Sequence
from pathlib import Path

from precompute import encoders, recipes
from precompute.clips import Source, read_sources
from precompute.latents import encode_latents
from precompute.plan import Part
from precompute.pool import DecodePool
from precompute.prompts import encode_prompts, wanted_texts
from precompute.recipes import Clip
from precompute.report import Report
from precompute.stage import Stage
from precompute.table import make_view
from precompute.video import BadVideo, Probe
from precompute.windows import Skipped, cut_windows
from shared import console
from shared.config import Config
from shared.errors import DataError, UsageError
from shared.files import Storage
from shared.geometry import Bucket
from shared.preemption import StopSignal
from shared.store import collection_for, write_recipe
from shared.variants import refusal, without_learned_positions
from shared.view import write_view


def precompute(config: Config, part: Part, stop: StopSignal) -> Report:
    """Encode what is not stored yet and write the view.

    Raises `UsageError`, `DataError` or `CacheError` for what a person must mend, `Preempted` after a signal.
    """
    report, started = Report(), time.perf_counter()
    stage = Stage(config, Storage(config.precompute.cache), recipes.find_encoders(config), part, stop, report)
    _refuse_buckets(stage)
    sources = read_sources(config.data)
    latents_recipe = recipes.latents_recipe(config, stage.encoders)
    prompts_recipe = recipes.prompts_recipe(config, stage.encoders)
    latents, prompts = collection_for("latents", latents_recipe), collection_for("prompts", prompts_recipe)
    write_recipe(stage.storage, latents, latents_recipe)
    write_recipe(stage.storage, prompts, prompts_recipe)
    texts = wanted_texts(config.data, sources, prompts.recipe)
    tokenizer = encoders.load_tokenizer(str(stage.encoders.tokenizer))
    with _decode_pool(config) as pool:
        clips, left_out = cut_clips(stage, sources, pool, latents.recipe)
        report.spend("probe", started)
        encode_prompts(stage, prompts, texts, tokenizer)
        inventory = encode_latents(stage, latents, clips, pool)
        report.seconds["decode"] = pool.busy_seconds()
    lengths = encoders.truncated_tokens(tokenizer, list(texts.values()), stage.encoders.conventions.text_length)
    truncated = dict(zip(texts, lengths, strict=True))
    view = make_view(config.data, clips, left_out, latents, prompts, texts, truncated, inventory)
    write_view(stage.storage, view)
    report.clips = len(view.split("train")) + len(view.split("held_out"))
    report.skipped = [(row.source, row.skipped) for row in view.split("skipped")]
    report.truncated_captions = sum(any(row.truncated_tokens) for row in view.rows)
    report.seconds["total"] = time.perf_counter() - started
    if not view.split("train"):
        reasons = "; ".join(f"{source}: {reason}" for source, reason in report.skipped[:3])
        raise DataError(f"data.name = {view.name!r}: no clip is left to train on ({reasons or 'all are held out'})")
    return report


def _decode_pool(config: Config) -> DecodePool:
    settings = config.precompute
    return DecodePool(
        workers=settings.decode_workers,
        deadline_seconds=settings.decode_deadline_seconds,
        memory_gib=settings.decode_memory_gib,
    )


def _refuse_buckets(stage: Stage) -> None:
    """Raises `UsageError` for a bucket that the checkpoint cannot be trained at, before anything is encoded."""
    data, conventions = stage.config.data, stage.encoders.conventions
    if stage.config.model.drop_learned_positions:
        conventions = without_learned_positions(conventions)
    for frames in data.frame_buckets:
        for height, width in data.resolutions:
            reason = refusal(conventions, Bucket(frames, height, width))
            if frames <= data.max_num_frames and reason:
                raise UsageError(f"data.frame_buckets, data.resolution_buckets: {reason}")


def cut_clips(
    stage: Stage, sources: Sequence[Source], pool: DecodePool, recipe: str
) -> tuple[list[Clip], list[tuple[Source, str]]]:
    """Probe every source and cut its windows; sources that give none come back with the reason."""
    clips: list[Clip] = []
    left_out: list[tuple[Source, str]] = []
    unique: list[Path] = list(dict.fromkeys(source.path for source in sources))
    probes: dict[Path, Probe | BadVideo] = {}
    with console.Progress("probing", len(unique)) as bar:
        for path, probe in zip(unique, pool.probe_all(unique), strict=True):
            stage.stop.check("nothing was lost")
            probes[path] = probe
            bar.advance()
    for source in sources:
        probe = probes[source.path]
        if isinstance(probe, BadVideo):
            left_out.append((source, probe.reason))
            continue
        windows = cut_windows(
            probe.timestamps_us,
            probe.height,
            probe.width,
            stage.config.data,
            start_seconds=source.start_seconds,
            end_seconds=source.end_seconds,
        )
        if isinstance(windows, Skipped):
            left_out.append((source, windows.reason))
            continue
        mode = stage.config.data.video_reshape_mode
        clips += [
            Clip(source, probe, window, recipes.latent_key(probe.sha256, window, mode, recipe)) for window in windows
        ]
    return clips, left_out

"""Stage 1 from top to bottom: find the clips, encode the prompts, encode the clips, write the table."""

import time
from collections.abc import Iterable
from dataclasses import replace

from precompute import encoders
from precompute.assignments import Part
from precompute.discover import Survey, survey
from precompute.estimate import bytes_needed, find_work
from precompute.latents import encode_latents
from precompute.prompts import encode_prompts
from precompute.report import Report, truncated_captions
from precompute.stage import Stage, open_stage
from precompute.video.pool import DecodePool
from precompute.video.windows import bucket_warnings
from precompute.view import make_view
from shared import console
from shared.cache.collection import write_recipe
from shared.cache.view import View, write_view
from shared.config import Config
from shared.errors import CacheError, DataError

MAX_SHOWN = 3
"""Clips that an error names."""


def precompute(config: Config, part: Part = Part()) -> Report:  # noqa: B008  (frozen)
    """Encode what is not stored yet and write the view.

    Raises `UsageError`, `DataError` or `CacheError` for what a person must mend.
    """
    started = time.perf_counter()
    stage = open_stage(config, part)
    report = stage.report
    report.warnings = bucket_warnings(config.data)
    for line in report.warnings:
        console.say(f"warning: {line}")
    marks = {"vae": stage.encoders.vae.marks, "text_encoder": stage.encoders.text_encoder.marks}
    with decode_pool(config) as pool:
        wanted = survey(stage, pool)
        report.spend("probe", started)
        _refuse_full_disk(stage, wanted)
        write_recipe(stage.storage, wanted.latents, wanted.latents_recipe)
        write_recipe(stage.storage, wanted.prompts, wanted.prompts_recipe)
        tokenizer = encoders.load_tokenizer(str(stage.encoders.tokenizer))
        encode_prompts(stage, wanted.prompts, wanted.texts, tokenizer)
        inventory = encode_latents(stage, wanted.latents, wanted.clips, pool)
        report.seconds["decode"] = pool.busy_seconds()
    stage.faults.update(wanted.transient)
    _refuse_faults(stage)
    text_length = stage.encoders.conventions.text_length
    lengths = encoders.truncated_tokens(tokenizer, list(wanted.texts.values()), text_length)
    truncated = dict(zip(wanted.texts, lengths, strict=True))
    view = replace(make_view(config, wanted, truncated, inventory), encoders=marks)
    _refuse_nothing_to_train_on(view)
    write_view(stage.storage, view)
    report.clips = len(view.split("train")) + len(view.split("held_out"))
    report.skipped = sorted((row.source, row.skipped) for row in view.split("skipped"))
    report.truncated = truncated_captions(config.data, view, truncated)
    report.seconds["total"] = time.perf_counter() - started
    return report


def _refuse_faults(stage: Stage) -> None:
    """Raises `DataError` naming the files that this machine could not read; a view would be smaller for its sake."""
    if stage.faults:
        raise DataError(
            f"{len(stage.faults)} of the files could not be read ({_listed(stage.faults.items())}); all others are "
            "stored, and the view is as it was: run the same command again"
        )


def _refuse_nothing_to_train_on(view: View) -> None:
    """Raises `DataError` while the view that was there before still is."""
    if view.split("train"):
        return
    skipped = _listed((row.source, row.skipped) for row in view.split("skipped"))
    held_out = [f"data.held_out_clips takes the {taken} there are"] if (taken := len(view.split("held_out"))) else []
    why = "; ".join([*held_out, *([skipped] if skipped else [])])
    raise DataError(f"data.name = {view.name!r}: no clip is left to train on ({why})")


def _listed(sources: Iterable[tuple[str, str]]) -> str:
    """The first few sources with their reasons, and how many more there are."""
    reasons = [f"{source}: {reason}" for source, reason in sorted(sources)]
    more = [f"and {len(reasons) - MAX_SHOWN} more"] if len(reasons) > MAX_SHOWN else []
    return "; ".join([*reasons[:MAX_SHOWN], *more])


def decode_pool(config: Config) -> DecodePool:
    """The children that probe and decode."""
    settings = config.precompute
    return DecodePool(
        workers=settings.decode_workers,
        deadline_seconds=settings.decode_deadline_seconds,
        memory_gib=settings.decode_memory_gib,
    )


def _refuse_full_disk(stage: Stage, wanted: Survey) -> None:
    """Raises `CacheError` before hours are spent on a disk that cannot hold the result."""
    needed, free = bytes_needed(stage, wanted, find_work(stage, wanted)), stage.storage.free_bytes()
    if free is not None and free < needed:
        raise CacheError(
            f"{stage.storage}: about {console.bytes_text(needed)} are needed, {console.bytes_text(free)} are free; "
            "free some space or choose another precompute.cache"
        )

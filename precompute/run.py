"""Stage 1 from top to bottom: find the clips, encode the prompts, encode the clips, write the view."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace

from precompute import encoders
from precompute.assignments import Part
from precompute.discover import survey
from precompute.estimate import find_work
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


def precompute(config: Config, part: Part = Part()) -> Report:  # noqa: B008
    """Encode what is not stored yet and write the view.

    Raises `UsageError`, `DataError` or `CacheError` for faults that the user can repair.
    """
    started = time.perf_counter()
    stage = open_stage(config, part)
    warnings = bucket_warnings(config.data)
    for line in warnings:
        console.say(f"warning: {line}")
    marks = {"vae": stage.encoders.vae.marks, "text_encoder": stage.encoders.text_encoder.marks}
    with decode_pool(config) as pool:
        wanted = survey(stage, pool)
        probed = time.perf_counter()
        latents_work, prompts_work = find_work(stage, wanted)
        _refuse_full_disk(stage, latents_work.bytes_needed + prompts_work.bytes_needed)
        write_recipe(stage.storage, wanted.latents, wanted.latents_recipe)
        write_recipe(stage.storage, wanted.prompts, wanted.prompts_recipe)
        tokenizer = encoders.load_tokenizer(str(stage.encoders.tokenizer))
        prompts = encode_prompts(stage, prompts_work, wanted.texts, tokenizer)
        latents = encode_latents(stage, latents_work, wanted.by_key, pool)
        decode_seconds = pool.busy_seconds()
    lost = {wanted.by_key[key].source.name: skip.reason for key, skip in latents.failed.items()}
    _refuse_failures(wanted.transient | lost)
    text_length = stage.encoders.conventions.text_length
    lengths = encoders.truncated_tokens(tokenizer, list(wanted.texts.values()), text_length)
    truncated = dict(zip(wanted.texts, lengths, strict=True))
    view = replace(make_view(config, wanted, truncated, latents.inventory), encoders=marks)
    _refuse_nothing_to_train_on(view)
    write_view(stage.storage, view)
    seconds = {"probe": probed - started, **prompts.seconds, **latents.seconds, "decode": decode_seconds}
    seconds["write"] = prompts.seconds.get("write", 0.0) + latents.seconds["write"]
    return Report(
        clips=len(view.split("train")) + len(view.split("held_out")),
        latents=latents.samples,
        prompts=prompts.samples,
        truncated=truncated_captions(config.data, view, truncated),
        written_bytes=prompts.written_bytes + latents.written_bytes,
        skipped=sorted((row.source, row.skipped) for row in view.split("skipped")),
        warnings=warnings,
        seconds={**seconds, "total": time.perf_counter() - started},
    )


def _refuse_failures(failed: Mapping[str, str]) -> None:
    """Raise `DataError` naming the files with transient failures, which would make the view smaller."""
    if failed:
        raise DataError(
            f"{len(failed)} files could not be read ({_listed(failed.items())}); the other clips are stored and the "
            "previous view is unchanged; run the same command again"
        )


def _refuse_nothing_to_train_on(view: View) -> None:
    """Raise `DataError` before an empty view replaces the previous one."""
    if view.split("train"):
        return
    held_out = len(view.split("held_out"))
    reasons = [f"data.held_out_clips takes all {held_out}"] if held_out else []
    if skipped := _listed((row.source, row.skipped) for row in view.split("skipped")):
        reasons.append(skipped)
    raise DataError(f"data.name = {view.name!r}: no clip is left to train on ({'; '.join(reasons)}); add clips")


def _listed(sources: Iterable[tuple[str, str]]) -> str:
    """Return the first few sources with their reasons, and the number of the rest."""
    reasons = [f"{source}: {reason}" for source, reason in sorted(set(sources))]
    more = [f"and {len(reasons) - MAX_SHOWN} more"] if len(reasons) > MAX_SHOWN else []
    return "; ".join([*reasons[:MAX_SHOWN], *more])


def decode_pool(config: Config) -> DecodePool:
    """Return the pool of processes that probe and decode."""
    settings = config.precompute
    return DecodePool(
        workers=settings.decode_workers,
        deadline_seconds=settings.decode_deadline_seconds,
        memory_gib=settings.decode_memory_gib,
    )


def _refuse_full_disk(stage: Stage, needed: int) -> None:
    """Raise `CacheError` before hours are spent on a disk that cannot hold the result."""
    free = stage.storage.free_bytes()
    if free is not None and free < needed:
        raise CacheError(
            f"{stage.storage}: needs about {console.bytes_text(needed)}, has {console.bytes_text(free)} free; "
            "free some space or choose another precompute.cache"
        )

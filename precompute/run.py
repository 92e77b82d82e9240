"""Stage 1 from top to bottom: find the clips, encode the prompts, encode the clips, write the view."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

from precompute.assignments import Inventory, Part
from precompute.discover import Clip, Stage, Survey, open_stage, survey
from precompute.estimate import find_work
from precompute.findings import find_weaknesses, tokens_of
from precompute.latents import encode_latents
from precompute.prompts import encode_prompts
from precompute.report import Report
from shared import console
from shared.cache.collection import SampleReader, write_recipe
from shared.cache.index import write_index
from shared.cache.staleness import shaping_settings
from shared.cache.storage import Storage
from shared.cache.view import View, ViewRow, read_view, rows_of, write_view
from shared.config import Config
from shared.errors import CacheError, DataError
from shared.fingerprint import key_of
from shared.latent_rgb import LatentRgb, fit_latent_rgb
from shared.media.pool import decode_pool
from shared.sources.rows import Source

MAX_SHOWN = 3
"""Clips that an error names."""
MAX_FITTED = 200
"""Clips that the map from latents to colors is fitted to: 17 unknowns per color need far fewer pixels."""


def precompute(config: Config, part: Part = Part()) -> Report:  # noqa: B008
    """Encode what is not stored yet and write the view.

    Raises `UsageError`, `DataError` or `CacheError` for faults that the user can repair.
    """
    started = time.perf_counter()
    stage = open_stage(config, part)
    # before the weights are hashed: a file that changes afterwards has another mark
    marks = {"vae": stage.encoders.vae.marks, "text_encoder": stage.encoders.text_encoder.marks}
    with decode_pool(config.precompute) as pool:
        wanted = survey(stage, pool)
        probed = time.perf_counter()
        latents_work, prompts_work = find_work(stage, wanted)
        _refuse_full_disk(stage, latents_work.bytes_needed + prompts_work.bytes_needed)
        write_recipe(stage.storage, wanted.latents, wanted.latents_recipe)
        write_recipe(stage.storage, wanted.prompts, wanted.prompts_recipe)
        tokens = tokens_of(stage, wanted, publish=True)
        findings = find_weaknesses(stage, wanted, tokens)
        for finding in (*wanted.warnings, *findings):
            console.say(f"warning: {finding}")
        prompts = encode_prompts(stage, prompts_work, wanted.texts)
        latents = encode_latents(stage, latents_work, wanted.by_key, pool)
        decode_seconds = pool.busy_seconds
    for collection, inventory in ((wanted.latents, latents.inventory), (wanted.prompts, prompts.inventory)):
        if inventory.num_parsed:
            write_index(stage.storage, collection.folder)
    lost = {wanted.by_key[key].source.name: skip.reason for key, skip in latents.failed.items()}
    if failed := wanted.transient | lost:  # they would make the view smaller
        raise DataError(
            f"{len(failed)} files could not be read ({_listed(failed.items())}); the other clips are stored and the "
            "previous view is unchanged; run the same command again"
        )
    text_length = stage.encoders.conventions.text_length
    counts = {key: found.total for key, found in tokens.items()}
    view = replace(make_view(config, wanted, counts, text_length, latents.inventory), encoders=marks)
    skipped = sorted((row.source, row.skipped) for row in view.split("skipped"))
    num_held_out = len(view.split("held_out"))
    if not view.split("train"):  # the previous view stays
        reasons = [f"data.held_out_clips takes all {num_held_out}"] if num_held_out else []
        reasons += [_listed(skipped)] if skipped else []
        raise DataError(f"data.name = {view.name!r}: no clip is left to train on ({'; '.join(reasons)}); add clips")
    write_view(stage.storage, replace(view, latent_rgb=find_latent_rgb(stage.storage, view)))
    seconds = {"probe": probed - started, **prompts.seconds, **latents.seconds, "decode": decode_seconds}
    seconds["write"] = prompts.seconds.get("write", 0.0) + latents.seconds["write"]
    return Report(
        clips=len(view.split("train")) + num_held_out,
        latents=latents.samples,
        prompts=prompts.samples,
        written_bytes=prompts.written_bytes + latents.written_bytes,
        skipped=skipped,
        retryable=sum(bool(row.latent_key) for row in view.split("skipped")),
        warnings=wanted.warnings,
        findings=findings,
        seconds={**seconds, "total": time.perf_counter() - started},
    )


def _listed(sources: Iterable[tuple[str, str]]) -> str:
    """Return the first few sources with their reasons, and the number of the rest."""
    reasons = [f"{source}: {reason}" for source, reason in sorted(set(sources))]
    more = [f"and {len(reasons) - MAX_SHOWN} more"] if len(reasons) > MAX_SHOWN else []
    return "; ".join([*reasons[:MAX_SHOWN], *more])


def _refuse_full_disk(stage: Stage, needed: int) -> None:
    """Raise `CacheError` before hours are spent on a disk that cannot hold the result."""
    free = stage.storage.free_bytes()
    if free is not None and free < needed:
        raise CacheError(
            f"{stage.storage}: needs about {console.bytes_text(needed)}, has {console.bytes_text(free)} free; "
            "free some space or choose another precompute.cache"
        )


def make_view(
    config: Config, wanted: Survey, tokens: Mapping[str, int], text_length: int, inventory: Inventory
) -> View:
    """Return the view, in which planned = stored + skipped(reason); `tokens` is prompt key -> tokens of the text.

    Sources are held out of training with all their windows, chosen by their bytes.
    """
    data = config.data
    keys = {text: key for key, text in wanted.texts.items()}
    stored = [clip for clip in wanted.clips if clip.key in inventory.stored]
    ordered = sorted(stored, key=lambda clip: (key_of(["held-out", clip.probe.sha256]), clip.key))
    held_out = {clip.probe.sha256 for clip in ordered[: data.held_out_clips]}
    rows = []
    for clip in wanted.clips:
        reason = "" if clip.key in inventory.stored else inventory.skipped[clip.key][0]
        split: Literal["train", "held_out"] = "held_out" if clip.probe.sha256 in held_out else "train"
        rows.append(_row(clip.source, clip, keys, tokens, text_length, "skipped" if reason else split, reason))
    rows += [_row(source, None, keys, tokens, text_length, "skipped", skip.reason) for source, skip in wanted.left_out]
    return View(
        data.name,
        wanted.latents,
        wanted.prompts,
        {text: keys[text] for text in (*data.validation_prompts, data.negative_prompt, "")},
        rows_of(rows),
        settings=shaping_settings(config, image_to_video=wanted.latents_recipe["image_conditions"] is not None),
    )


def find_latent_rgb(storage: Storage, view: View) -> LatentRgb:
    """Return the map of latents to colors: that of the stored view if it has the same clips, else a new one."""
    try:
        old = read_view(storage, view.name)
    except CacheError:  # missing or damaged
        old = None
    if old is not None and old.hash == view.hash and old.latent_rgb:
        return old.latent_rgb
    keys = view.split("train").column("latent_key")[:MAX_FITTED]
    try:
        reader = SampleReader(storage, view.latents, set(keys), whole_up_to_bytes=0)
        return fit_latent_rgb(reader.read(key) for key in keys)
    except CacheError as error:
        console.say(f"warning: {error}; latents are not shown as pictures")
        return ()


def _row(
    source: Source,
    clip: Clip | None,
    keys: Mapping[str, str],
    tokens: Mapping[str, int],
    text_length: int,
    split: Literal["train", "held_out", "skipped"],
    skipped: str,
) -> ViewRow:
    captions = () if source.skipped else source.captions
    prompt_keys = tuple(keys[caption.text] for caption in captions)
    stamps = clip.window.timestamps_us if clip else (0,)
    return ViewRow(
        source=source.name,
        start_seconds=stamps[0] / 1e6,
        end_seconds=stamps[-1] / 1e6,
        frames=clip.window.bucket.frames if clip else 0,
        height=clip.window.bucket.height if clip else 0,
        width=clip.window.bucket.width if clip else 0,
        flip=bool(clip and clip.window.flip),
        latent_key=clip.key if clip else "",
        captions=tuple(caption.text for caption in captions),
        caption_weights=tuple(caption.weight for caption in captions),
        prompt_keys=prompt_keys,
        truncated_tokens=tuple(max(0, tokens[key] - text_length) for key in prompt_keys),
        caption_tokens=tuple(tokens[key] for key in prompt_keys),
        split=split,
        skipped=skipped,
        source_sha256=clip.probe.sha256 if clip else "",
        repeats=source.repeats,
        loss_weight=source.loss_weight,
        source_height=clip.probe.height if clip else 0,
        source_width=clip.probe.width if clip else 0,
        source_seconds=clip.probe.end_us / 1e6 if clip else 0.0,
    )

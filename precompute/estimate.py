"""`precog plan`: what a run would do, found out before any model is loaded, and no model at all."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from precompute.assignments import Inventory, PlannedShard, propose, take_inventory
from precompute.changes import changed_clips, recipe_changes
from precompute.discover import Survey, survey
from precompute.encoders import vae_precision
from precompute.report import Tally, reasons_json
from precompute.stage import Stage
from precompute.video.pool import DecodePool
from precompute.video.windows import bucket_warnings
from shared import console
from shared.cache.collection import Collection, collections, shards
from shared.cache.shard import SAMPLES_PER_SHARD, Receipt
from shared.cache.shard import SHARD_BYTES as MAX_SHARD_BYTES
from shared.cache.view import View, read_view, view_names
from shared.device import DTYPES
from shared.errors import CacheError, UsageError
from shared.model.geometry import latent_shape

SAMPLE_BYTES = 4096
"""Tar headers, facts, padding and receipt of one sample, rounded up."""
SHARD_BYTES = 16 * 1024
"""The tar's end and the receipt's frame."""


@dataclass(slots=True)
class Estimate:
    """What would be made; `as_json` is the `--json` contract."""

    clips: int = 0
    latents: Tally = field(default_factory=Tally)
    prompts: Tally = field(default_factory=Tally)
    prompts_recipe_changed: list[str] = field(default_factory=list)
    """Fields of the prompts' recipe that differ from that of the view of this name."""
    new: int = 0
    """Clips to encode whose source the view of this name did not have."""
    changed: list[tuple[str, str]] = field(default_factory=list)
    """Source and reason of the clips to encode that this view had otherwise."""
    orphaned: dict[str, int] = field(default_factory=dict)
    """Kind -> stored samples that neither this config nor another view uses; "bytes" of the latents and prompts."""
    shards: dict[str, int] = field(default_factory=dict)
    needed_bytes: int = 0
    stored_bytes: int = 0
    free_bytes: int | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "clips": self.clips,
            "latents": {"planned": self.latents.made, "reused": self.latents.reused},
            "prompts": {"planned": self.prompts.made, "reused": self.prompts.reused},
            "prompts_recipe_changed": self.prompts_recipe_changed,
            "new": self.new,
            "changed": reasons_json(self.changed),
            "orphaned": self.orphaned,
            "shards": self.shards,
            "bytes": {"needed": self.needed_bytes, "stored": self.stored_bytes, "free": self.free_bytes},
            "skipped": reasons_json(self.skipped),
            "warnings": self.warnings,
            "seconds": {"total": round(self.seconds, 3)},
        }


@dataclass(frozen=True, slots=True)
class Work:
    """The shards to make and what the collections hold already."""

    latents: list[PlannedShard]
    prompts: list[PlannedShard]
    latents_inventory: Inventory
    prompts_inventory: Inventory


def estimate(stage: Stage, pool: DecodePool) -> Estimate:
    """Look, count and compare; nothing is written. Raises as `precompute` does."""
    started = time.perf_counter()
    wanted = survey(stage, pool)
    work = find_work(stage, wanted)
    clips = wanted.by_key
    planned = {key for shard in work.latents for key in shard.keys}
    refused = {key: reason for key, (reason, _) in work.latents_inventory.skipped.items() if key not in planned}
    found = Estimate(
        clips=sum(clip.key not in refused for clip in wanted.clips),
        latents=Tally(len(planned), len(work.latents_inventory.stored & clips.keys())),
        prompts=Tally(
            sum(len(shard.keys) for shard in work.prompts), len(work.prompts_inventory.stored & wanted.texts.keys())
        ),
        shards={"latents": len(work.latents), "prompts": len(work.prompts)},
        needed_bytes=bytes_needed(stage, wanted, work),
        free_bytes=stage.storage.free_bytes(),
        warnings=[
            *bucket_warnings(stage.config.data),
            *(f"{source}: {reason}; left out of this plan" for source, reason in sorted(wanted.transient.items())),
        ],
    )
    left_out = [(source.name, skipped.reason) for source, skipped in wanted.left_out if skipped.permanent]
    left_out += [(clip.source.name, refused[clip.key]) for clip in wanted.clips if clip.key in refused]
    found.skipped = sorted(left_out)
    views = _views(stage, found)
    old = views.pop(stage.config.data.name, None)
    found.new, found.changed = changed_clips(stage, wanted, planned, old)
    if old is not None:
        found.prompts_recipe_changed = recipe_changes(stage.storage, old.prompts, wanted.prompts_recipe)
    _count_stored(stage, wanted, views, found)
    found.seconds = time.perf_counter() - started
    return found


def find_work(stage: Stage, wanted: Survey) -> Work:
    """What a worker that comes now would make; raises `UsageError` for shards that no reader takes."""
    settings = stage.config.precompute
    latents_inventory = take_inventory(stage.storage, wanted.latents)
    prompts_inventory = take_inventory(stage.storage, wanted.prompts)
    latents = propose(
        stage.storage,
        {key: f"{wanted.latents.folder}/{clip.window.bucket}" for key, clip in wanted.by_key.items()},
        latents_inventory,
        keys_per_shard=settings.clips_per_shard,
        keys_per_batch=settings.vae_batch_size,
        retry_skipped=settings.retry_skipped,
    )
    prompts = propose(
        stage.storage,
        dict.fromkeys(wanted.texts, wanted.prompts.folder),
        prompts_inventory,
        keys_per_shard=settings.prompts_per_shard,
        keys_per_batch=settings.text_batch_size,
    )
    work = Work(latents, prompts, latents_inventory, prompts_inventory)
    _refuse_large_shards(stage, wanted, work)
    return work


def bytes_needed(stage: Stage, wanted: Survey, work: Work) -> int:
    """Bytes that the work will put on the disk, rounded up by a little per sample and shard."""
    sizes = _sample_bytes(stage, wanted)
    return sum(SHARD_BYTES + sum(sizes[key] for key in shard.keys) for shard in (*work.latents, *work.prompts))


def _refuse_large_shards(stage: Stage, wanted: Survey, work: Work) -> None:
    """Raises `UsageError` before a plan is written whose shards no reader would take."""
    sizes = _sample_bytes(stage, wanted)
    for name, shards_to_make in (("clips_per_shard", work.latents), ("prompts_per_shard", work.prompts)):
        for shard in shards_to_make:
            size, count = SHARD_BYTES + sum(sizes[key] for key in shard.keys), len(shard.keys)
            if size > MAX_SHARD_BYTES or count > SAMPLES_PER_SHARD:
                raise UsageError(
                    f"precompute.{name} = {getattr(stage.config.precompute, name)}: {count} of "
                    f"{shard.folder.rpartition('/')[2]} take {console.bytes_text(size)}; a shard has at most "
                    f"{console.bytes_text(MAX_SHARD_BYTES)} and {SAMPLES_PER_SHARD} samples, so "
                    f"{min(count * MAX_SHARD_BYTES // size, SAMPLES_PER_SHARD)} here"
                )


def _sample_bytes(stage: Stage, wanted: Survey) -> dict[str, int]:
    """Key -> bytes in a shard, of every clip and text."""
    settings, conventions, vae = stage.config.precompute, stage.encoders.conventions, stage.encoders.vae
    channels, item = vae.config["latent_channels"], DTYPES[vae_precision(settings.vae_dtype, vae)].itemsize
    images = 1 + settings.noised_image_count if conventions.image_to_video else 0
    sizes: dict[str, int] = {}
    for key, clip in wanted.by_key.items():
        _, frames, height, width = latent_shape(clip.window.bucket)
        sizes[key] = SAMPLE_BYTES + 2 * channels * (frames + images) * height * width * item
    text_encoder = stage.encoders.text_encoder
    embed = conventions.text_length * text_encoder.config["d_model"]
    embed *= DTYPES[text_encoder.precision(settings.text_dtype)].itemsize
    return sizes | dict.fromkeys(wanted.texts, SAMPLE_BYTES + embed)


def _views(stage: Stage, found: Estimate) -> dict[str, View]:
    """The cache's views by name; a damaged one is a warning."""
    views = {}
    for name in view_names(stage.storage):
        try:
            views[name] = read_view(stage.storage, name)
        except CacheError as error:
            found.warnings.append(f"{error}; what it uses counts as used by no data set")
    return views


def _count_stored(stage: Stage, wanted: Survey, others: Mapping[str, View], found: Estimate) -> None:
    """Bytes on disk, and what no view would use once this config's view is written."""
    used = {*wanted.by_key, *wanted.texts}
    for view in others.values():
        used |= {row.latent_key for row in view.rows} | {key for row in view.rows for key in row.prompt_keys}
        used |= set(view.special_prompts.values())
    unused: Counter[str] = Counter(latents=0, prompts=0, bytes=0)
    for collection, receipt in _receipts(stage):
        found.stored_bytes += receipt.size
        for place in receipt.samples:
            if place.key not in used:
                unused.update({collection.kind: 1, "bytes": place.length})
    found.orphaned = dict(unused)


def _receipts(stage: Stage) -> list[tuple[Collection, Receipt]]:
    return [
        (collection, receipt)
        for collection in collections(stage.storage)
        for _, receipt in shards(stage.storage, collection.folder)
    ]

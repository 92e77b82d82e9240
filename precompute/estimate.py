"""The work of a run, found before any model is loaded, and for `precog plan` the reasons for it."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from precompute import recipes
from precompute.assignments import Inventory, PlannedShard, Wanted, propose, take_inventory
from precompute.discover import Clip, Stage, Survey, survey
from precompute.encoders import vae_precision
from precompute.findings import DataFinding, find_weaknesses, tokens_of
from precompute.report import SampleCounts, reasons_json
from shared import console
from shared.cache.collection import Collection, collection_for, collections, read_recipe
from shared.cache.shard import SAMPLES_PER_SHARD
from shared.cache.shard import SHARD_BYTES as MAX_SHARD_BYTES
from shared.cache.staleness import shaping_settings
from shared.cache.storage import Storage
from shared.cache.view import View, ViewRow, read_view, view_names
from shared.config import Config, fields_shaping, recipe_fields
from shared.device import DTYPES
from shared.errors import CacheError, UsageError
from shared.fingerprint import Json
from shared.media.pool import DecodePool
from shared.model.geometry import latent_shape

SAMPLE_BYTES = 4096
"""Tar headers, facts, padding and receipt of one sample, rounded up."""
SHARD_BYTES = 16 * 1024
"""The tar's end and the receipt's frame."""


@dataclass(frozen=True, slots=True)
class Work:
    """The wanted keys of one collection, its contents, and the shards to make."""

    wanted: Wanted
    inventory: Inventory
    shards: list[PlannedShard]
    bytes_needed: int
    """Size of these shards, rounded up."""

    @property
    def planned(self) -> set[str]:
        return {key for shard in self.shards for key in shard.keys}

    @property
    def tally(self) -> SampleCounts:
        return SampleCounts(len(self.planned), len(self.inventory.stored & self.wanted.folders.keys()))


@dataclass(frozen=True, slots=True)
class Estimate:
    """The work of a run; `as_json` is the `--json` contract."""

    clips: int
    latents: SampleCounts
    prompts: SampleCounts
    prompts_recipe_changed: list[str]
    """Fields of the prompts' recipe that differ from the old view of this name."""
    new: int
    """Clips to encode whose source the old view of this name does not have."""
    changed: list[tuple[str, str]]
    """Source and reason of the other clips to encode."""
    orphaned: dict[str, int]
    """Kind -> stored samples that neither this config nor another view uses; "bytes" of all of them."""
    shards: dict[str, int]
    bytes: dict[str, int | None]
    """Needed, stored and free; the free bytes of an object store are None."""
    skipped: list[tuple[str, str]]
    warnings: list[str]
    findings: list[DataFinding]
    """Weak captions, and clips that are there twice."""
    seconds: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return {
            **{one.name: getattr(self, one.name) for one in fields(self)},  # `asdict` copies every source's name
            "findings": [asdict(finding) for finding in self.findings],
            "latents": {"planned": self.latents.made, "reused": self.latents.reused},
            "prompts": {"planned": self.prompts.made, "reused": self.prompts.reused},
            "changed": reasons_json(self.changed),
            "skipped": reasons_json(self.skipped),
        }


def estimate(stage: Stage, pool: DecodePool) -> Estimate:
    """Find the work of a run and compare it with the old view; nothing is written. Raises as `precompute` does."""
    started = time.perf_counter()
    wanted = survey(stage, pool)
    latents, prompts = find_work(stage, wanted)
    clips, planned = wanted.by_key, latents.planned
    refused = {key: reason for key, (reason, _) in latents.inventory.skipped.items() if key not in planned}
    skipped = [(source.name, skip.reason) for source, skip in wanted.left_out if skip.permanent]
    skipped += [(clip.source.name, refused[clip.key]) for clip in wanted.clips if clip.key in refused]
    views, warnings = _views(stage.storage)
    old = views.pop(stage.config.data.name, None)
    to_encode = [clip for key, clip in clips.items() if key in planned]
    recipe = wanted.latents_recipe
    changed = changed_clips(stage.config, stage.storage, recipe, to_encode, old) if old and to_encode else []
    known = {work.wanted.collection: work.inventory for work in (latents, prompts)}
    stored_bytes, orphaned = _count_stored(stage.storage, {*clips, *wanted.texts}, views, known)
    return Estimate(
        clips=sum(clip.key not in refused for clip in wanted.clips),
        latents=latents.tally,
        prompts=prompts.tally,
        prompts_recipe_changed=recipe_changes(stage.storage, old.prompts, wanted.prompts_recipe) if old else [],
        new=len(to_encode) - len(changed),
        changed=changed,
        orphaned=orphaned,
        shards={"latents": len(latents.shards), "prompts": len(prompts.shards)},
        bytes={
            "needed": latents.bytes_needed + prompts.bytes_needed,
            "stored": stored_bytes,
            "free": stage.storage.free_bytes(),
        },
        skipped=sorted(skipped),
        warnings=[
            *(f"{source}: {reason}; left out of this plan" for source, reason in sorted(wanted.transient.items())),
            *wanted.warnings,
            *warnings,
        ],
        findings=find_weaknesses(stage, wanted, tokens_of(stage, wanted, publish=False)),
        seconds={"total": round(time.perf_counter() - started, 3)},
    )


def find_work(stage: Stage, wanted: Survey) -> tuple[Work, Work]:
    """Read the inventories and find the work on latents and prompts.

    Raises `UsageError` for shards that are too large to be read.
    """
    settings, sizes = stage.config.precompute, _sample_bytes(stage, wanted)
    inventory = take_inventory(stage.storage, wanted.latents)
    attempts = {key: attempt for key, (_, attempt) in inventory.skipped.items()}
    latents = Wanted(
        wanted.latents,
        {key: f"{wanted.latents.folder}/{clip.window.bucket}" for key, clip in wanted.by_key.items()},
        settings.clips_per_shard,
        settings.vae_batch_size,
        attempts if settings.retry_skipped else {},
    )
    prompts = Wanted(
        wanted.prompts,
        dict.fromkeys(wanted.texts, wanted.prompts.folder),
        settings.prompts_per_shard,
        settings.text_batch_size,
    )
    return (
        _find_work(stage.storage, latents, inventory, sizes, "clips_per_shard"),
        _find_work(stage.storage, prompts, take_inventory(stage.storage, wanted.prompts), sizes, "prompts_per_shard"),
    )


def _find_work(storage: Storage, wanted: Wanted, inventory: Inventory, sizes: Mapping[str, int], field: str) -> Work:
    needed = 0
    planned = propose(storage, wanted, inventory)
    for shard in planned:
        size, count = SHARD_BYTES + sum(sizes[key] for key in shard.keys), len(shard.keys)
        if size > MAX_SHARD_BYTES or count > SAMPLES_PER_SHARD:
            raise UsageError(
                f"precompute.{field} = {wanted.keys_per_shard}: {count} of {shard.folder.rpartition('/')[2]} take "
                f"{console.bytes_text(size)}, more than the {console.bytes_text(MAX_SHARD_BYTES)} or "
                f"{SAMPLES_PER_SHARD} samples of a shard; "
                f"set it to {min(count * MAX_SHARD_BYTES // size, SAMPLES_PER_SHARD)}"
            )
        needed += size
    return Work(wanted, inventory, planned, needed)


def _sample_bytes(stage: Stage, wanted: Survey) -> dict[str, int]:
    """Return key -> bytes in a shard, of every clip and text, rounded up."""
    settings, conventions, vae = stage.config.precompute, stage.encoders.conventions, stage.encoders.vae
    channels, item = vae.config["latent_channels"], DTYPES[vae_precision(settings.vae_dtype, vae)].itemsize
    images = 1 + settings.noised_image_count if conventions.image_to_video else 0
    sizes: dict[str, int] = {}
    for key, clip in wanted.by_key.items():
        _, frames, height, width = latent_shape(clip.window.bucket)
        moments = 2 * channels * (frames + images) * item
        sizes[key] = SAMPLE_BYTES + (moments + 3 * frames) * height * width
    text_encoder = stage.encoders.text_encoder
    embed = conventions.text_length * text_encoder.config["d_model"]
    embed *= DTYPES[text_encoder.precision(settings.text_dtype)].itemsize
    return sizes | dict.fromkeys(wanted.texts, SAMPLE_BYTES + embed)


def _views(storage: Storage) -> tuple[dict[str, View], list[str]]:
    """Return the cache's views by name, and a warning for each damaged one."""
    views, warnings = {}, []
    for name in view_names(storage):
        try:
            views[name] = read_view(storage, name)
        except CacheError as error:
            warnings.append(f"{error}; its samples count as unused")
    return views, warnings


def _count_stored(
    storage: Storage, used: set[str], others: Mapping[str, View], known: Mapping[Collection, Inventory]
) -> tuple[int, dict[str, int]]:
    """Return the bytes of all tars, and counts of the samples that neither `used` nor the other views need."""
    for view in others.values():
        used |= set().union(*view.keys.values())
    stored_bytes, unused = 0, Counter(latents=0, prompts=0, bytes=0)
    for collection in collections(storage):
        inventory = known.get(collection) or take_inventory(storage, collection)
        stored_bytes += inventory.tar_bytes
        left = [length for key, length in inventory.sample_bytes.items() if key not in used]
        unused.update({collection.kind: len(left), "bytes": sum(left)})
    return stored_bytes, dict(unused)


def changed_clips(
    config: Config, storage: Storage, recipe: Mapping[str, Json], clips: Sequence[Clip], old: View
) -> list[tuple[str, str]]:
    """Return (source, reason) of the clips to encode whose source the old view had; the other clips are new.

    `recipe` is that of the latents. A reason is the difference from the old view, by the config field's name.
    """
    before: dict[str, list[ViewRow]] = {}
    for row in old.rows:
        if row.latent_key:
            before.setdefault(row.source, []).append(row)
    fields = recipe_changes(storage, old.latents, recipe)
    now = shaping_settings(config, image_to_video=recipe["image_conditions"] is not None)
    settings = [name for name in fields_shaping("clips") if old.settings.get(name) != now[name]]
    changed = []
    for clip in clips:
        rows = before.get(clip.source.name, [])
        mode, sha256 = config.data.video_reshape_mode, clip.probe.sha256
        old_key = recipes.latent_key(sha256, clip.window, mode, old.latents.recipe)
        reasons = [f"recipe changed: {', '.join(fields)}"] if fields else []
        if all(row.latent_key != old_key for row in rows):
            same_bytes = any(row.source_sha256 == sha256 for row in rows)
            reasons += [] if same_bytes else ["source bytes changed"]
            reasons += [f"settings changed: {', '.join(settings)}"] if settings else ["window changed"] * same_bytes
        elif not fields:
            skipped = any(row.latent_key == clip.key and row.skipped for row in rows)
            reasons = ["skipped before" if skipped else "no longer stored"]
        changed += [(clip.source.name, "; ".join(reasons))] if rows else []
    return changed


def recipe_changes(storage: Storage, old: Collection, recipe: Mapping[str, Json]) -> list[str]:
    """Return the differences between `recipe` and the `old` collection's: config fields, else the recipe's entries."""
    if old == collection_for(old.kind, recipe):
        return []
    try:
        before = _flat(read_recipe(storage, old))
    except CacheError:
        return ["unknown, the old recipe.json is missing"]
    now = _flat(recipe)
    entries = recipe_fields("latents", "image_latents") if old.kind == "latents" else recipe_fields("prompts")
    changed = {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}
    return sorted(entries.get(name, name) for name in changed)


def _flat(recipe: Mapping[str, Json], prefix: str = "") -> dict[str, Json]:
    flat: dict[str, Json] = {}
    for name, value in recipe.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat

"""Reasons why clips have to be encoded: the differences from the old view of the same name, by the field's name."""

from collections.abc import Mapping, Sequence

from precompute import recipes
from precompute.clip import Clip
from shared.cache.collection import Collection, collection_for, read_recipe
from shared.cache.staleness import shaping_settings
from shared.cache.storage import Storage
from shared.cache.view import View, ViewRow
from shared.config import Config, fields_shaping, recipe_fields
from shared.errors import CacheError
from shared.fingerprint import Json


def changed_clips(
    config: Config, storage: Storage, recipe: Mapping[str, Json], clips: Sequence[Clip], old: View
) -> list[tuple[str, str]]:
    """Return (source, reason) of the clips to encode whose source the old view had; the other clips are new.

    `recipe` is that of the latents.
    """
    before: dict[str, list[ViewRow]] = {}
    for row in old.rows:
        if row.latent_key:
            before.setdefault(row.source, []).append(row)
    known = [clip for clip in clips if clip.source.name in before]
    if not known:
        return []
    fields = recipe_changes(storage, old.latents, recipe)
    now = shaping_settings(config, image_to_video=recipe["image_conditions"] is not None)
    settings = [name for name in fields_shaping("clips") if old.settings.get(name) != now[name]]
    mode = config.data.video_reshape_mode
    return [(clip.source.name, _reason(clip, mode, before[clip.source.name], old, fields, settings)) for clip in known]


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


def _reason(
    clip: Clip, mode: str, rows: Sequence[ViewRow], old: View, fields: Sequence[str], settings: Sequence[str]
) -> str:
    """Return the difference from the rows that this source had in the old view."""
    old_key = recipes.latent_key(clip.probe.sha256, clip.window, mode, old.latents.recipe)
    same_bytes = any(row.source_sha256 == clip.probe.sha256 for row in rows)
    same_window = any(_window(row) == _clip_window(clip) for row in rows)
    reasons = [f"recipe changed: {', '.join(fields)}"] if fields else []
    if not same_bytes:
        reasons.append("source bytes changed")
    if not same_window or (same_bytes and all(row.latent_key != old_key for row in rows)):
        reasons.append(f"settings changed: {', '.join(settings)}" if settings else "window changed")
    skipped_before = any(row.latent_key == clip.key and row.skipped for row in rows)
    return "; ".join(reasons) or ("skipped before" if skipped_before else "no longer stored")


def _window(row: ViewRow) -> tuple[object, ...]:
    return row.start_seconds, row.end_seconds, row.frames, row.height, row.width, row.flip


def _clip_window(clip: Clip) -> tuple[object, ...]:
    stamps, bucket = clip.window.timestamps_us, clip.window.bucket
    return stamps[0] / 1e6, stamps[-1] / 1e6, bucket.frames, bucket.height, bucket.width, clip.window.flip


def _flat(recipe: Mapping[str, Json], prefix: str = "") -> dict[str, Json]:
    flat: dict[str, Json] = {}
    for name, value in recipe.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat

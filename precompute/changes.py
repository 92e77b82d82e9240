"""Why clips have to be encoded: what is different from the view that this name had before, by the field's name."""

from collections.abc import Mapping, Sequence

from precompute import recipes
from precompute.clip import Clip
from precompute.discover import Survey
from precompute.stage import Stage
from shared.cache.collection import Collection, collection_for, read_recipe
from shared.cache.settings import shaping_settings
from shared.cache.storage import Storage
from shared.cache.view import View, ViewRow
from shared.errors import CacheError
from shared.fingerprint import Json

NOT_OF_CLIPS = ("data.caption_column", "data.held_out_clips", "data.id_token", "data.video_column")
"""Fields that shape a view without shaping any clip."""
FIELDS = {
    "latents": {
        "precision": "precompute.vae_dtype",
        "tiling": "precompute.enable_tiling",
        "slicing": "precompute.enable_slicing",
        "channels_last": "precompute.channels_last",
        "compiled": "precompute.compile_vae",
        "image_conditions.noised": "precompute.noised_image_count",
    },
    "prompts": {"precision": "precompute.text_dtype", "quantization": "precompute.text_quantization"},
}
"""What a recipe has from one field of the config: its name there -> the field."""


def changed_clips(
    stage: Stage, wanted: Survey, planned: set[str], old: View | None
) -> tuple[int, list[tuple[str, str]]]:
    """How many of the clips to encode the old view did not have, and (source, reason) of those it had otherwise."""
    before: dict[str, list[ViewRow]] = {}
    for row in old.rows if old else ():
        if row.latent_key:
            before.setdefault(row.source, []).append(row)
    clips = [clip for key, clip in wanted.by_key.items() if key in planned]
    known = [clip for clip in clips if clip.source.name in before]
    if old is None or not known:
        return len(clips), []
    fields = recipe_changes(stage.storage, old.latents, wanted.latents_recipe)
    settings = _setting_changes(stage, wanted, old)
    reasons = [(clip.source.name, _why(stage, clip, before[clip.source.name], old, fields, settings)) for clip in known]
    return len(clips) - len(known), reasons


def recipe_changes(storage: Storage, old: Collection, recipe: Mapping[str, Json]) -> list[str]:
    """What differs between `recipe` and that of the `old` collection: the config's fields, else the recipe's own."""
    if old == collection_for(old.kind, recipe):
        return []
    try:
        before = _flat(read_recipe(storage, old))
    except CacheError:
        return ["unknown, the old recipe.json is missing"]
    now = _flat(recipe)
    changed = {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}
    return sorted(FIELDS[old.kind].get(name, name) for name in changed)


def _setting_changes(stage: Stage, wanted: Survey, old: View) -> list[str]:
    """The config's fields that shape clips and differ; none for a view that did not write them down."""
    now = shaping_settings(stage.config, image_to_video=wanted.latents_recipe["image_conditions"] is not None)
    names = [name for name in old.settings if name.startswith("data.") and name not in NOT_OF_CLIPS]
    return sorted(name for name in names if old.settings[name] != now.get(name))


def _why(
    stage: Stage, clip: Clip, rows: Sequence[ViewRow], old: View, fields: Sequence[str], settings: Sequence[str]
) -> str:
    """What is different from the rows that this source had in the old view."""
    mode = stage.config.data.video_reshape_mode
    key_then = recipes.latent_key(clip.probe.sha256, clip.window, mode, old.latents.recipe)
    same_bytes = any(row.source_sha256 == clip.probe.sha256 for row in rows)
    same_window = any(_window(row) == _clip_window(clip) for row in rows)
    reasons = [f"recipe changed: {', '.join(fields)}"] if fields else []
    if not same_bytes:
        reasons.append("source bytes changed")
    if not same_window or (same_bytes and all(row.latent_key != key_then for row in rows)):
        reasons.append(f"settings changed: {', '.join(settings)}" if settings else "window changed")
    never_made = any(row.latent_key == clip.key and row.skipped for row in rows)
    return "; ".join(reasons) or ("skipped before" if never_made else "no longer stored")


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

"""Compare a view with a config's settings and checkpoint, without reading the encoders' weights.

Fields that only name places (names, roots, paths) are not compared, so a cache may move between machines.
"""

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from shared.cache.view import View
from shared.config import Config, field_value, fields_shaping
from shared.errors import CacheError, UsageError
from shared.fingerprint import Json, sha256_file
from shared.model.pretrained import Component, FileMark, present_part, pretrained_folder

Recipe = Mapping[str, Any]
NAMES = {"vae": "VAE", "text_encoder": "T5"}
AGAIN = "run `precog precompute` with this config, which encodes only what is not stored"


def shaping_settings(config: Config, *, image_to_video: bool) -> dict[str, Json]:
    """Return field -> value of the settings that shape a view; buckets that no clip can take are left out."""
    images = ("image_latents",) if image_to_video else ()
    settings = {name: field_value(config, name) for name in fields_shaping("clips", "view", "latents", "prompts")}
    settings |= {name: field_value(config, name) for name in fields_shaping(*images)}
    frames = {count for count in config.data.frame_buckets if count <= config.data.max_num_frames}
    resolutions = [list(size) for size in config.data.resolutions]
    return settings | {"data.frame_buckets": sorted(frames), "data.resolution_buckets": resolutions}


def check_cache(config: Config, view: View, latents: Recipe, prompts: Recipe) -> None:
    """Raise `CacheError` for the first difference between the config and the view with these recipes."""
    for difference in chain(
        stale_settings(config, view, latents, prompts), other_encoders(config, view, latents, prompts)
    ):
        raise CacheError(difference)


def stale_settings(config: Config, view: View, latents: Recipe, prompts: Recipe) -> Iterator[str]:
    """Yield a line for the settings that differ from those of the view, and one for each prompt it lacks."""
    if changes := list(_changes(config, view, latents, prompts)):
        yield f"view {view.name}: made with other settings than this config's: {', '.join(changes)}; {AGAIN}"
    wanted = {
        "data.validation_prompts": config.data.validation_prompts,
        "data.negative_prompt": (config.data.negative_prompt,),
    }
    for field, texts in wanted.items():
        if missing := [text for text in texts if text not in view.special_prompts]:
            yield f"view {view.name}: {field}: {missing[0]!r} is not in it; {AGAIN}"


def _changes(config: Config, view: View, latents: Recipe, prompts: Recipe) -> Iterator[str]:
    resolved = {"precompute.vae_dtype": latents["precision"], "precompute.text_dtype": prompts["precision"]}
    now = shaping_settings(config, image_to_video=latents["image_conditions"] is not None)
    for field, value in now.items():
        before = view.settings.get(field)
        if value not in (before, resolved.get(field, before)):
            yield f"{field} was {before!r}, is {value!r}"


def other_encoders(config: Config, view: View, latents: Recipe, prompts: Recipe) -> Iterator[str]:
    """Yield a line for each part of the checkpoint that differs from the one that made the view.

    A part that this machine lacks is no problem, and nothing is downloaded. Weight files whose marks are
    those in the view are taken as equal. Others, as on another machine, are hashed (a hub file's name is its hash).
    """
    for name, recipe in (("vae", latents["vae"]), ("text_encoder", prompts["text_encoder"])):
        part = present_part(config.model, name)
        if part is not None and (problem := _difference(part, recipe, view.encoders.get(name, ()))):
            yield f"view {view.name}: the cache was made with another {NAMES[name]} than {part.folder}: {problem}"
    try:
        tokenizer = pretrained_folder(config.model, "tokenizer", download=False)
    except UsageError:
        return
    for name, sha256 in prompts["tokenizer"].items():
        if (tokenizer / name).is_file() and sha256_file(tokenizer / name) != sha256:
            line = f"the cache was made with another tokenizer than {tokenizer}: {name} differs"
            yield f"view {view.name}: {line}; {AGAIN}"


def _difference(part: Component, recipe: Recipe, marks: tuple[FileMark, ...]) -> str | None:
    """Return the first difference and the remedy, or None."""
    advice = "run `precog precompute` with this config, or train with the checkpoint that made the cache"
    before, now = recipe["config"], part.settings
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            return f"{key} was {before.get(key)!r}, is {now.get(key)!r}; {advice}"
    if part.marks == marks or part.sha256() == recipe["weights"]:
        return None
    return f"the weights differ; {advice}"

"""The fields that shape a view: stage 1 writes them beside it, and stage 2 compares them with its own config.

What says only where the clips are (names, roots, paths) is left out, so that a cache may move between machines.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from shared.cache.view import View
from shared.config import Config
from shared.fingerprint import Json

DATA_FIELDS = (
    "caption_column",
    "fps",
    "held_out_clips",
    "id_token",
    "random_flip",
    "skip_frames_end",
    "skip_frames_start",
    "video_column",
    "video_reshape_mode",
    "window_placement",
    "windows_per_clip",
)
PRECOMPUTE_FIELDS = (
    "channels_last",
    "compile_vae",
    "enable_slicing",
    "enable_tiling",
    "text_dtype",
    "text_quantization",
    "vae_dtype",
)
"""Those that are in a recipe; one more is for image-to-video alone."""

Recipe = Mapping[str, Any]


def shaping_settings(config: Config, *, image_to_video: bool) -> dict[str, Json]:
    """Field -> value, resolved: only the buckets that a clip can take, and the heights x widths in force."""
    data = config.data.model_dump(mode="json", include=set(DATA_FIELDS))
    names = {*PRECOMPUTE_FIELDS, "noised_image_count"} if image_to_video else set(PRECOMPUTE_FIELDS)
    settings = config.precompute.model_dump(mode="json", include=names)
    frames = {count for count in config.data.frame_buckets if count <= config.data.max_num_frames}
    return {
        **{f"data.{name}": value for name, value in data.items()},
        "data.frame_buckets": sorted(frames),
        "data.resolution_buckets": [list(size) for size in config.data.resolutions],
        **{f"precompute.{name}": value for name, value in settings.items()},
    }


def stale_settings(config: Config, view: View, latents: Recipe, prompts: Recipe) -> Iterator[str]:
    """One line for each way in which the view, whose recipes these are, is not the one that the config describes."""
    again = "run `precog precompute` with this config, which encodes only what is not stored"
    if changes := list(_changes(config, view, latents, prompts)):
        yield f"view {view.name}: made with other settings than this config's: {', '.join(changes)}; {again}"
    wanted = {"data.validation_prompts": config.data.validation_prompts}
    wanted["data.negative_prompt"] = (config.data.negative_prompt,)
    for field, texts in wanted.items():
        if missing := [text for text in texts if text not in view.special_prompts]:
            yield f"view {view.name}: {field}: {missing[0]!r} is not in it; {again}"


def _changes(config: Config, view: View, latents: Recipe, prompts: Recipe) -> Iterator[str]:
    ours = shaping_settings(config, image_to_video=latents["image_conditions"] is not None)
    came_to = {"precompute.vae_dtype": latents["precision"], "precompute.text_dtype": prompts["precision"]}
    for field, value in ours.items():
        before = view.settings.get(field)
        if value not in (before, came_to.get(field, before)):
            yield f"{field} was {before!r}, is {value!r}"

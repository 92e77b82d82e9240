"""Make the view: a row for every clip with its keys, and for every source left out with the reason."""

from collections.abc import Mapping, Sequence
from typing import Literal

from precompute.assignments import Inventory
from precompute.clip import Clip
from precompute.discover import Survey
from precompute.sources.rows import Source
from shared.cache.staleness import shaping_settings
from shared.cache.view import View, ViewRow
from shared.config import Config, Data
from shared.fingerprint import key_of


def make_view(config: Config, wanted: Survey, truncated: Mapping[str, int], inventory: Inventory) -> View:
    """Return the view, in which planned = stored + skipped(reason); `truncated` is prompt key -> cut tokens."""
    data, image_to_video = config.data, wanted.latents_recipe["image_conditions"] is not None
    keys = {text: key for key, text in wanted.texts.items()}
    held_out = _held_out(data, [clip for clip in wanted.clips if clip.key in inventory.stored])
    rows = []
    for clip in wanted.clips:
        reason = "" if clip.key in inventory.stored else inventory.skipped[clip.key][0]
        split: Literal["train", "held_out"] = "held_out" if clip.probe.sha256 in held_out else "train"
        rows.append(_row(clip.source, clip, keys, truncated, "skipped" if reason else split, reason))
    for source, skip in wanted.left_out:
        rows.append(_row(source, None, keys, truncated, "skipped", skip.reason))
    special = {text: keys[text] for text in (*data.validation_prompts, data.negative_prompt, "")}
    settings = shaping_settings(config, image_to_video=image_to_video)
    return View(data.name, wanted.latents, wanted.prompts, special, tuple(rows), settings=settings)


def _held_out(data: Data, clips: Sequence[Clip]) -> set[str]:
    """Return hashes of the sources kept out of training, chosen by their bytes with all their windows."""
    ordered = sorted(clips, key=lambda clip: (key_of(["held-out", clip.probe.sha256]), clip.key))
    return {clip.probe.sha256 for clip in ordered[: data.held_out_clips]}


def _row(
    source: Source,
    clip: Clip | None,
    keys: Mapping[str, str],
    truncated: Mapping[str, int],
    split: Literal["train", "held_out", "skipped"],
    skipped: str,
) -> ViewRow:
    prompt_keys = tuple(keys[caption.text] for caption in source.captions)
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
        captions=tuple(caption.text for caption in source.captions),
        caption_weights=tuple(caption.weight for caption in source.captions),
        prompt_keys=prompt_keys,
        truncated_tokens=tuple(truncated[key] for key in prompt_keys),
        split=split,
        skipped=skipped,
        source_sha256=clip.probe.sha256 if clip else "",
    )

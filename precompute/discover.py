"""Inputs of a run: the clips and texts of the config with their keys, and the sources without a clip."""

import gc
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from precompute import recipes
from precompute.assignments import Part
from precompute.probes import probe_files
from precompute.windows import Window, cut_windows
from shared import console
from shared.cache.collection import Collection, collection_for
from shared.cache.storage import Storage, open_storage
from shared.config import Config
from shared.errors import UsageError
from shared.file_types import with_names
from shared.fingerprint import KEY_LENGTH, Json
from shared.media.pool import DecodePool
from shared.media.probe import Probe, Probed, Skipped
from shared.model.conventions import refusal
from shared.model.geometry import Bucket
from shared.sources.rows import Source, read_sources
from shared.sources.tables import escaped

LEFT_OUT = "left out: by data.leave_out"
"""Reason of a clip that the user does not want."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One run of stage 1."""

    config: Config
    storage: Storage
    encoders: recipes.Encoders
    part: Part


@dataclass(frozen=True, slots=True)
class Clip:
    """A window of a source with its captions, named by its key."""

    source: Source
    probe: Probe
    window: Window
    key: str


@dataclass(frozen=True, slots=True)
class Survey:
    """The facts that are known before a model is loaded."""

    clips: list[Clip]
    left_out: list[tuple[Source, Skipped]]
    """Sources without a clip, for good or because of a transient failure."""
    texts: dict[str, str]
    """Prompt key -> text of every caption, validation and negative prompt, and the empty one for dropout."""
    latents_recipe: dict[str, Json]
    prompts_recipe: dict[str, Json]
    latents: Collection
    prompts: Collection
    warnings: list[str] = field(default_factory=list)
    """Oddities of the data set's files and captions."""

    @property
    def by_key(self) -> dict[str, Clip]:
        """Clips by key; clips of equal bytes and window share one, and are stored once."""
        return {clip.key: clip for clip in self.clips}

    @property
    def transient(self) -> dict[str, str]:
        """Source -> reason of the failures that another run may not have; the view is not written then."""
        return {source.name: skipped.reason for source, skipped in self.left_out if not skipped.permanent}


def open_stage(config: Config, part: Part = Part()) -> Stage:  # noqa: B008
    """Find the cache and the encoders; raises `UsageError` naming what is missing."""
    storage = open_storage(config.precompute.cache, local_cache_gib=config.precompute.local_cache_gib)
    return Stage(config, storage, recipes.find_encoders(config), part)


def survey(stage: Stage, pool: DecodePool) -> Survey:
    """Read the sources, probe the videos, cut the windows and compute all keys.

    Raise `UsageError` or `DataError` for a fault of the user.
    """
    gc.freeze()  # the garbage collector leaves out what the libraries made, a million objects
    try:
        return _survey(stage, pool)
    finally:
        gc.unfreeze()


def _survey(stage: Stage, pool: DecodePool) -> Survey:
    data = stage.config.data
    _refuse_buckets(stage)
    listing = read_sources(data)
    sources = listing.sources
    latents_recipe = recipes.latents_recipe(stage.config, stage.encoders)
    prompts_recipe = recipes.prompts_recipe(stage.config, stage.encoders)
    latents, prompts = collection_for("latents", latents_recipe), collection_for("prompts", prompts_recipe)
    clips, left_out = cut_clips(stage, sources, pool, latents.recipe)
    texts = [caption.text for source in sources if not source.skipped for caption in source.captions]
    texts += [*data.validation_prompts, data.negative_prompt, ""]
    by_key = {recipes.prompt_key(text, prompts.recipe): text for text in texts}
    return Survey(clips, left_out, by_key, latents_recipe, prompts_recipe, latents, prompts, listing.warnings)


def cut_clips(
    stage: Stage, sources: Sequence[Source], pool: DecodePool, recipe: str
) -> tuple[list[Clip], list[tuple[Source, Skipped]]]:
    """Probe every source and cut its windows; return the clips, and the sources without one, in their order."""
    rows: dict[Path, list[int]] = {}
    for row, source in enumerate(sources):
        if not source.skipped:
            rows.setdefault(source.path, []).append(row)
    found: dict[int, list[Clip] | Skipped] = {
        row: Skipped(source.skipped) for row, source in enumerate(sources) if source.skipped
    }
    remember = stage.config.precompute.remember_files
    with console.Progress("probing", len(rows)) as bar:
        for path, outcome in probe_files(stage.storage, list(rows), pool, stage.part, remember=remember):
            # the time stamps, the bulk of a probe, end here
            found |= {row: _cut(stage, sources[row], outcome, recipe) for row in rows[path]}
            bar.advance()
    clips: list[Clip] = []
    left_out: list[tuple[Source, Skipped]] = []
    unwanted = read_leave_out(stage.config.data.leave_out)
    for row, source in enumerate(sources):
        if isinstance(cut := found[row], Skipped):
            left_out.append((source, cut))
            continue
        for clip in cut:
            if unwanted.isdisjoint({(clip.key, None), (clip.key, source.name)}):
                clips.append(clip)
            else:
                left_out.append((source, Skipped(LEFT_OUT)))
    if unwanted and not any(skipped.reason == LEFT_OUT for _, skipped in left_out):
        console.say("warning: data.leave_out names no clip of these settings; write it again with `precog report data`")
    return clips, left_out


def read_leave_out(path: Path | None) -> frozenset[tuple[str, str | None]]:
    """Return (key, source or None) of each line in the file of `data.leave_out`.

    A source is a JSON string: copies of a file have one key. `#` begins a comment. Raises `UsageError`.
    """
    if path is None:
        return frozenset()
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"data.leave_out: {path} cannot be read ({error}); give a text file with keys") from None
    found: set[tuple[str, str | None]] = set()
    for line in lines:
        if not (text := line.strip()) or text.startswith("#"):
            continue
        match = re.fullmatch(rf'([0-9a-f]{{{KEY_LENGTH}}}) *("(?:[^"\\]|\\.)*")? *(?:#.*)?', text)
        try:
            name = json.loads(match[2]) if match and match[2] else None
        except ValueError:
            match = None
        if match is None:
            raise UsageError(
                f"data.leave_out: {path}: {text!r} is not a key; give one key per line, or a key and a name"
            )
        found.add((match[1], name))
    return frozenset(found)


def _cut(stage: Stage, source: Source, found: Probed | Skipped, recipe: str) -> list[Clip] | Skipped:
    if isinstance(found, Skipped):
        return replace(found, reason=with_names(found.reason, escaped(source.name)))
    data, probe = stage.config.data, found.probe
    windows = cut_windows(
        found.timestamps_us,
        probe.height,
        probe.width,
        data,
        start_us=probe.start_us,
        end_us=probe.end_us,
        start_seconds=source.start_seconds,
        end_seconds=source.end_seconds,
    )
    if isinstance(windows, Skipped):
        return windows
    keys = [recipes.latent_key(probe.sha256, window, data.video_reshape_mode, recipe) for window in windows]
    return [Clip(source, probe, window, key) for window, key in zip(windows, keys, strict=True)]


def _refuse_buckets(stage: Stage) -> None:
    """Raise `UsageError` for a bucket that the checkpoint cannot be trained at, before anything is encoded."""
    data, conventions = stage.config.data, stage.encoders.conventions
    for frames in (frames for frames in data.frame_buckets if frames <= data.max_num_frames):
        for height, width in data.resolutions:
            if reason := refusal(conventions, Bucket(frames, height, width)):
                raise UsageError(f"data.frame_buckets, data.resolution_buckets: {reason}")

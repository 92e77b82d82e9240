"""What a run wants: the clips and texts of the config, their keys, and the sources that give no clip."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from precompute import recipes
from precompute.clip import Clip, Skipped
from precompute.prefetch import ahead
from precompute.prompts import wanted_texts
from precompute.sources.rows import Source, read_sources
from precompute.stage import Stage
from precompute.video.known_files import Remembered
from precompute.video.pool import DecodePool
from precompute.video.probe import BadVideo, MachineFault, Probed
from precompute.video.windows import cut_windows
from shared import console
from shared.cache.collection import Collection, collection_for
from shared.errors import CacheError, UsageError
from shared.fingerprint import Json
from shared.model.conventions import refusal, without_learned_positions
from shared.model.geometry import Bucket


@dataclass(frozen=True, slots=True)
class Survey:
    """Everything that is known before a model is loaded."""

    clips: list[Clip]
    left_out: list[tuple[Source, Skipped]]
    """Sources that give no clip, and why."""
    texts: dict[str, str]
    """Prompt key -> text."""
    latents_recipe: dict[str, Json]
    prompts_recipe: dict[str, Json]
    latents: Collection
    prompts: Collection

    @property
    def by_key(self) -> dict[str, Clip]:
        """Clips that share bytes and window share a key, and are stored once."""
        return {clip.key: clip for clip in self.clips}


def survey(stage: Stage, pool: DecodePool) -> Survey:
    """Read the sources, probe the videos, cut the windows, name everything.

    Raises `UsageError` or `DataError` for what a person must mend, `Preempted` after a signal.
    """
    _refuse_buckets(stage)
    sources = read_sources(stage.config.data)
    latents_recipe = recipes.latents_recipe(stage.config, stage.encoders)
    prompts_recipe = recipes.prompts_recipe(stage.config, stage.encoders)
    latents, prompts = collection_for("latents", latents_recipe), collection_for("prompts", prompts_recipe)
    clips, left_out = cut_clips(stage, sources, pool, latents.recipe)
    texts = wanted_texts(stage.config.data, sources, prompts.recipe)
    return Survey(clips, left_out, texts, latents_recipe, prompts_recipe, latents, prompts)


def cut_clips(
    stage: Stage, sources: Sequence[Source], pool: DecodePool, recipe: str
) -> tuple[list[Clip], list[tuple[Source, Skipped]]]:
    """Probe every source and cut its windows; sources that give none come back with the reason."""
    places: dict[Path, list[int]] = {}
    for place, source in enumerate(sources):
        places.setdefault(source.path, []).append(place)
    clips: dict[int, list[Clip]] = {}
    left_out: dict[int, Skipped] = {}
    for path, outcome in _probes(stage, list(places), pool):
        for place in places[path]:
            if isinstance(outcome, BadVideo | MachineFault):
                left_out[place] = Skipped(outcome.reason, isinstance(outcome, BadVideo))
                continue
            found = _cut(stage, sources[place], outcome, recipe)
            if isinstance(found, list):
                clips[place] = found
            else:
                left_out[place] = found
    return (
        [clip for place in sorted(clips) for clip in clips[place]],
        [(sources[place], left_out[place]) for place in sorted(left_out)],
    )


def _cut(stage: Stage, source: Source, found: Probed, recipe: str) -> list[Clip] | Skipped:
    """The clips of a source; its time stamps, the bulk of a probe, are not kept."""
    windows = cut_windows(
        found.timestamps_us,
        found.probe.height,
        found.probe.width,
        stage.config.data,
        start_seconds=source.start_seconds,
        end_seconds=source.end_seconds,
    )
    if isinstance(windows, Skipped):
        return windows
    mode, probe = stage.config.data.video_reshape_mode, found.probe
    return [Clip(source, probe, window, recipes.latent_key(probe.sha256, window, mode, recipe)) for window in windows]


def _probes(
    stage: Stage, paths: list[Path], pool: DecodePool
) -> Iterator[tuple[Path, Probed | BadVideo | MachineFault]]:
    """What each file holds, in order; a file that is remembered is not read."""
    memory = Remembered() if stage.config.precompute.remember_files else None
    marks = {path: mark for path in paths if memory and (mark := memory.mark(path))}
    fresh = ahead(pool.probe_all([path for path in paths if path not in marks]), 64)
    try:
        with console.Progress("probing", len(paths)) as bar:
            for path in paths:
                found = memory.probed(marks[path]) if memory and path in marks else next(fresh)
                if memory and path not in marks and isinstance(found, Probed):
                    memory.add(found)
                yield path, found
                bar.advance()
    finally:
        fresh.close()
        if memory:
            _save(memory)


def _save(memory: Remembered) -> None:
    """What cannot be remembered costs the next start its time, not this one its work."""
    try:
        memory.save()
    except (CacheError, OSError) as error:
        console.say(f"warning: precompute.remember_files: {error}")


def _refuse_buckets(stage: Stage) -> None:
    """Raises `UsageError` for a bucket that the checkpoint cannot be trained at, before anything is encoded."""
    data, conventions = stage.config.data, stage.encoders.conventions
    if stage.config.model.drop_learned_positions:
        conventions = without_learned_positions(conventions)
    for frames in data.frame_buckets:
        for height, width in data.resolutions:
            reason = refusal(conventions, Bucket(frames, height, width))
            if frames <= data.max_num_frames and reason:
                raise UsageError(f"data.frame_buckets, data.resolution_buckets: {reason}")

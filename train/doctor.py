"""`precog doctor`: checkpoint, config and cache, each alone and against each other, before a GPU is paid for.

Everything a run would refuse is found here at once, and also what a run cannot know to be wrong.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any, TypeVar

import torch

from shared.cache.collection import SampleReader, read_recipe
from shared.cache.staleness import Recipe, cache_problems
from shared.cache.storage import Storage, open_storage
from shared.cache.view import View, ViewRow, read_view
from shared.config import Config
from shared.errors import CacheError, PrecogError, UsageError
from shared.model.conventions import Conventions, read_conventions, refusal
from shared.model.geometry import Bucket, latent_shape, padding_frames
from shared.model.pretrained import Part, present_folder, pretrained_config, pretrained_part
from train.data.dataset import Dataset, name
from train.objective import NoiseSchedule, read_schedule

T = TypeVar("T")
SAMPLES = 3
"""Clips of each bucket that are read and built."""


@dataclass(slots=True)
class Diagnosis:
    """What was found; errors stop a run, warnings do not."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    errors: list[PrecogError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def attempt(self, check: Callable[[], T]) -> T | None:
        """The check's result, or None with its error noted, once if several checks meet it."""
        try:
            return check()
        except PrecogError as error:
            if str(error) not in map(str, self.errors):
                self.errors.append(error)
            return None


@dataclass(frozen=True, slots=True)
class Cache:
    """One view and the recipes of its samples."""

    storage: Storage
    view: View
    latents: Recipe
    prompts: Recipe


@dataclass(frozen=True, slots=True)
class Subject:
    """What could be opened of the experiment, for `train.measure`."""

    config: Config
    cache: Cache
    conventions: Conventions
    schedule: NoiseSchedule


def examine(config: Config) -> tuple[Diagnosis, Subject | None]:
    """Every check that needs no forward pass; the second is None where something does not open."""
    diagnosis = Diagnosis()
    transformer = diagnosis.attempt(lambda: pretrained_part(config.model, "transformer"))
    cache = diagnosis.attempt(lambda: open_cache(config))
    read = diagnosis.attempt(lambda: _read_conventions(config, cache))
    schedule = diagnosis.attempt(lambda: _read_schedule(config)) if read else None
    if transformer is not None:
        diagnosis.attempt(lambda: _check_precision(config, transformer, diagnosis))
    if read is not None:
        diagnosis.facts += _describe(read)
        _check_schedule(read, diagnosis)
        diagnosis.errors += [UsageError(reason) for reason in _refused_buckets(config, cache, read)]
    if cache is not None:
        diagnosis.errors += map(CacheError, cache_problems(config, cache.view, cache.latents, cache.prompts))
        _check_view(cache.view, diagnosis)
    if cache is None or read is None or schedule is None:
        return diagnosis, None
    mismatches = list(_mismatches(cache, read))
    diagnosis.errors += map(CacheError, mismatches)
    if not mismatches:
        diagnosis.attempt(lambda: _check_samples(config, cache, read, schedule, diagnosis))
    return diagnosis, Subject(config, cache, read, schedule)


def open_cache(config: Config) -> Cache:
    """Raises `CacheError` if the view is not there or damaged."""
    storage = open_storage(config.precompute.cache, local_cache_gib=config.precompute.local_cache_gib)
    view = read_view(storage, config.data.name)
    return Cache(storage, view, read_recipe(storage, view.latents), read_recipe(storage, view.prompts))


def _read_conventions(config: Config, cache: Cache | None) -> Conventions:
    """From the checkpoint's own configs; a machine without the VAE takes its config from the cache."""
    transformer = pretrained_config(config.model, "transformer")
    if cache is None or present_folder(config.model, "vae"):
        vae = pretrained_config(config.model, "vae")
    else:
        vae = cache.latents["vae"]["config"]
    drop = config.model.drop_learned_positions
    return read_conventions(transformer, vae, _scheduler(config), drop_learned_positions=drop)


def _read_schedule(config: Config) -> NoiseSchedule:
    return read_schedule(_scheduler(config))


def _scheduler(config: Config) -> dict[str, Any]:
    return pretrained_config(config.model, "scheduler")


def _describe(conventions: Conventions) -> Iterator[tuple[str, str]]:
    grid = f"{conventions.sample_height}x{conventions.sample_width} latents, {conventions.sample_frames} frames"
    fixed = conventions.fixed_bucket
    yield "model", conventions.name
    yield "positions", f"{conventions.positions}, grid {grid}" + (f", only {fixed}" if fixed else "")
    patch = conventions.patch_size_t
    yield "padding", f"copies in front, to a multiple of {patch} latent frames" if patch else "none"
    yield "latents", f"posterior x {conventions.scaling_factor:g}"
    if conventions.image_to_video:
        yield "image latents", f"posterior x {conventions.image_scaling_factor:g}, frame 0 of the padded clip"
    if conventions.ofs is not None:
        yield "ofs", f"{conventions.ofs:g}"
    fixed_text = ", not to be changed" if conventions.text_length_fixed else ""
    yield "text", f"{conventions.text_length} tokens of {conventions.text_embed_dim}{fixed_text}"
    terminal = "ends at zero signal" if conventions.zero_terminal_snr else "ends with signal left"
    yield "schedule", f"velocity, snr_shift_scale {conventions.snr_shift_scale:g}, {terminal}"


def _check_precision(config: Config, transformer: Part, diagnosis: Diagnosis) -> None:
    published, asked = transformer.dtype(), config.train.mixed_precision
    used = published if asked == "auto" else asked
    diagnosis.facts.append(("precision", f"published in {published}, trained in {used}"))
    reasons = {
        ("bf16", "fp16"): "fp16 ends at 65504, where activations of bf16 weights do not: the loss becomes NaN",
        ("fp16", "bf16"): "bf16 has 8 bits of the 11 that the published weights have",
    }
    if reason := reasons.get((published, used)):
        diagnosis.warnings.append(
            f"train.mixed_precision = {asked!r}: {transformer.folder} is published in {published}; {reason}; "
            'right would be "auto"'
        )


def _check_schedule(conventions: Conventions, diagnosis: Diagnosis) -> None:
    if not conventions.zero_terminal_snr:
        diagnosis.warnings.append(
            "scheduler_config.json: rescale_betas_zero_snr is false, true in every published CogVideoX: "
            "sampling starts from pure noise, which training would never show"
        )


def _refused_buckets(config: Config, cache: Cache | None, conventions: Conventions) -> list[str]:
    """Why buckets of the config or of the view cannot be trained."""
    frames = [count for count in config.data.frame_buckets if count <= config.data.max_num_frames]
    wanted = {Bucket(count, *size) for count, size in product(frames, config.data.resolutions)}
    stored = {row.bucket for row in cache.view.rows if row.split != "skipped"} if cache else set()
    where = dict.fromkeys(stored, f"view {cache.view.name}" if cache else "")
    where |= dict.fromkeys(wanted, "data.frame_buckets, data.resolution_buckets")
    return [f"{where[bucket]}: {reason}" for bucket in sorted(where) if (reason := refusal(conventions, bucket))]


def _check_view(view: View, diagnosis: Diagnosis) -> None:
    counts = {split: len(view.split(split)) for split in ("train", "held_out", "skipped")}
    diagnosis.facts.append(("clips", ", ".join(f"{count} {split}" for split, count in counts.items())))
    used = [row for row in view.rows if row.split != "skipped"]
    cut = [row for row in used if any(row.truncated_tokens)]
    if cut:
        worst = max(cut, key=lambda row: max(row.truncated_tokens))
        diagnosis.warnings.append(
            f"view {view.name}: captions of {len(cut)} of {len(used)} clips are longer than the text length "
            f"and are cut, at most by {max(worst.truncated_tokens)} tokens ({name(worst)}); shorten them"
        )


def _mismatches(cache: Cache, conventions: Conventions) -> Iterator[str]:
    """How the cache's recipes differ from what the transformer takes."""
    again = "run `precog precompute` with this config"
    length = cache.prompts["text_length"]
    if length != conventions.text_length:
        yield (
            f"view {cache.view.name}: prompts were encoded with {length} tokens, "
            f"the transformer takes {conventions.text_length}; {again}"
        )
    if conventions.image_to_video and not cache.latents["image_conditions"]:
        yield (
            f"view {cache.view.name}: made for text-to-video, without the first frames that this "
            f"image-to-video transformer takes; {again}"
        )


def _check_samples(
    config: Config, cache: Cache, conventions: Conventions, schedule: NoiseSchedule, diagnosis: Diagnosis
) -> None:
    """Build the first clips of each bucket as training would. Raises `CacheError` for a missing or damaged sample."""
    prompts = SampleReader(cache.storage, cache.view.prompts, whole_up_to_bytes=0)
    for split in ("train", "held_out"):
        dataset = Dataset(cache.storage, cache.view, split, conventions, schedule, config.train)
        built: dict[Bucket, int] = {}
        for number, row in enumerate(dataset.rows):
            built[row.bucket] = built.get(row.bucket, 0) + 1
            if built[row.bucket] > SAMPLES:
                continue
            for key in row.prompt_keys:
                prompts.read(key)
            shapes = _check_example(dataset, number, row, conventions)
            if built[row.bucket] == 1:
                diagnosis.facts.append((f"{split} {row.bucket}", shapes))


def _check_example(dataset: Dataset, number: int, row: ViewRow, conventions: Conventions) -> str:
    """The shapes at the transformer's door."""
    example = dataset.fixed_example(number, timestep=0)
    channels, frames, height, width = latent_shape(row.bucket, conventions.out_channels)
    frames += padding_frames(frames, conventions.patch_size_t)
    assert example.model_input.latents.shape == (frames, conventions.in_channels, height, width)
    assert example.model_input.prompt_embeds.shape == (conventions.text_length, conventions.text_embed_dim)
    assert example.target.shape == (frames, channels, height, width)
    if not all(torch.isfinite(part).all() for part in (example.model_input.latents, example.target)):
        raise CacheError(f"{name(row)}: its latents are not finite; precompute.vae_dtype = 'fp32' may help")
    shapes = (example.model_input.latents, example.model_input.prompt_embeds, example.target)
    return "input {}, text {}, target {}".format(*("x".join(map(str, part.shape)) for part in shapes))

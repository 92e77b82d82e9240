"""Training examples: read a clip's moments and prompt from the cache, draw latents, noise and timestep.

Every draw is keyed by (seed, epoch, sample key), so a clip's example depends on nothing else.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from shared import seeding
from shared.cache.collection import SampleReader
from shared.cache.index import SampleTable
from shared.cache.storage import Storage
from shared.cache.view import View, ViewRow
from shared.config import Train
from shared.errors import CacheError
from shared.model.conventions import Conventions
from shared.model.geometry import latent_shape
from train.data.example import Example, ModelInput, image_condition, pad_front
from train.data.order import Draw, Windows, epoch_places, window_size
from train.objective import NoiseSchedule, add_noise, min_snr_weight, velocity


class Dataset:
    """One split of a view, read by row number."""

    def __init__(
        self,
        storage: Storage,
        view: View,
        split: str,
        conventions: Conventions,
        schedule: NoiseSchedule,
        train: Train,
        stored: Mapping[str, SampleTable] = MappingProxyType({}),
    ) -> None:
        """Find the samples; `stored` holds those of the view's collections by folder, which are read otherwise."""
        self.rows = view.split(split)
        self.places = epoch_places(self.rows.column("repeats"))
        """(row, repetition) of every place of an epoch."""
        self._keys: list[str] = self.rows.column("latent_key")
        self._empty_prompt = view.special_prompts[""]
        prompts = {self._empty_prompt, *chain.from_iterable(self.rows.column("prompt_keys"))}
        room = storage.limit_bytes
        if room is None:
            latents_up_to = prompts_up_to = math.inf
        elif split == "held_out":  # few clips, scattered over the shards
            latents_up_to = prompts_up_to = 0.0
        else:  # the order follows the shards of latents, prompts are scattered
            latents_up_to, prompts_up_to = math.inf, room / 2
        latents, texts = (stored.get(collection.folder) for collection in (view.latents, view.prompts))
        self._latents = SampleReader(storage, view.latents, self._keys, latents_up_to, latents)
        self._prompts = SampleReader(storage, view.prompts, prompts, prompts_up_to, texts)
        self._room_bytes = None if room is None else room - self._prompts.copies_bytes
        self._conventions = conventions
        self._schedule = schedule
        self._train = train
        self._check()

    def _check(self) -> None:
        """Raise `CacheError` naming the first clip whose samples are missing or have another shape."""
        text = (self._conventions.text_length, self._conventions.text_embed_dim)
        fix = "run `precog precompute` with this config"
        buckets = self.rows.buckets
        tokens = {bucket: self._conventions.num_tokens(bucket) for bucket in set(buckets)}
        self._tokens = [tokens[bucket] for bucket in buckets]
        expected = {bucket: latent_shape(bucket, self._conventions.out_channels) for bucket in tokens}
        found_shapes = self._latents.shapes(self._keys)
        for row, (shapes, bucket) in enumerate(zip(found_shapes, buckets, strict=True)):
            channels, *size = expected[bucket]
            if (found := shapes["moments"]) != (2 * channels, *size):
                raise CacheError(f"{self._label(row)}: expected moments {(2 * channels, *size)}, got {found}; {fix}")
            if self._conventions.image_to_video and "image_moments" not in shapes:
                raise CacheError(
                    f"{self._label(row)}: the cache was made for text-to-video, without first frames; {fix}"
                )
        prompts = [(row, key) for row, keys in enumerate(self.rows.column("prompt_keys")) for key in keys]
        for (row, _), shapes in zip(prompts, self._prompts.shapes([key for _, key in prompts]), strict=True):
            if (found := shapes["prompt_embeds"]) != text:
                raise CacheError(f"{self._label(row)}: expected prompt_embeds {text}, got {found}; {fix}")

    def _label(self, row: int) -> str:
        return clip_label(self.rows[row])

    def windows(self) -> Windows | None:
        """Return the order that reads a few shards at a time, by `train.shuffle_shards`; None shuffles all clips."""
        sizes = dict(sorted(self._latents.shard_bytes.items()))
        chosen, size = self._train.shuffle_shards, len(sizes)
        if isinstance(chosen, int):
            size = chosen
        elif chosen == "auto" and self._room_bytes is not None:
            size = window_size(list(sizes.values()), self._room_bytes)
        if size >= len(sizes):
            return None
        numbers = {tar: number for number, tar in enumerate(sizes)}
        shards = [numbers[tar] for tar in self._latents.shards_of(self._keys)]
        return Windows(size, np.array([shards[row] for row, _ in self.places]))

    def tokens(self, row: int) -> int:
        """Return the number of text and video tokens of a clip."""
        return self._tokens[row]

    def timesteps(self, draws: Sequence[Draw], step: int) -> list[int]:
        """Return the timestep of each clip of the global batch of optimizer step `step`.

        Uniform: keyed by the clip's draw. Stratified: the schedule is cut into one equal part per clip, the parts are
        assigned by the step, and the clip's draw chooses within its part. Each clip's timestep is uniform either way.
        """
        train, size = self._train, len(self._schedule)
        generators = [seeding.generator("timestep", train.seed, *self._place(draw)) for draw in draws]
        if train.timestep_sampling == "uniform":
            return [int(generator.integers(size)) for generator in generators]
        words = seeding.generator("strata", train.seed, step).bit_generator.random_raw(len(draws))
        strata = np.argsort(words, kind="stable").tolist()
        return [
            int((stratum + generator.random()) / len(draws) * size)
            for stratum, generator in zip(strata, generators, strict=True)
        ]

    def _place(self, draw: Draw) -> tuple[str | int, ...]:
        """Return the key of a draw beside the seed: epoch, sample key and, from the second time on, the repetition."""
        repetition = (draw.repetition,) if draw.repetition else ()
        return draw.epoch, self._keys[draw.row], *repetition

    def example(self, draw: Draw, timestep: int) -> Example:
        """Return the training example of one draw, on the CPU in fp32; `timestep` comes from `timesteps`."""
        row, train = self.rows[draw.row], self._train
        place = self._place(draw)
        where = (train.seed, *place)
        samples = self._read(self._latents, row.latent_key, row)
        latents = self._scaled(posterior_draw(samples["moments"], "posterior", *where))
        condition = None
        if self._conventions.image_to_video:
            condition = self._draw_image(samples["image_moments"], len(latents), *where)
        noise = seeding.normal(tuple(latents.shape), "noise", *where)
        embeds = self._draw_prompt(row, *where)
        name = ":".join(map(str, place))
        example = self._example(row, name, latents, noise, timestep, embeds, condition)
        gamma = train.snr_gamma
        weight = 1.0 if gamma is None else min_snr_weight(timestep, self._schedule, gamma)
        return replace(example, weight=weight * row.loss_weight)

    def fixed_example(self, row: int, timestep: int) -> Example:
        """Return a held-out example: posterior mean, first caption, and noise keyed by clip and timestep."""
        clip = self.rows[row]
        samples = self._read(self._latents, clip.latent_key, clip)
        latents = self._scaled(samples["moments"].float().chunk(2)[0])
        condition = None
        if self._conventions.image_to_video:
            mean = samples["image_moments"][0].float().chunk(2)[0]
            condition = image_condition(mean.transpose(0, 1), len(latents), self._conventions)
        noise = seeding.normal(tuple(latents.shape), "held-out", clip.latent_key, timestep)
        embeds = self._read(self._prompts, clip.prompt_keys[0], clip)["prompt_embeds"]
        return self._example(clip, f"held-out:{clip.latent_key}", latents, noise, timestep, embeds, condition)

    def first_frame_moments(self, row: int) -> Tensor:
        """Return a copy of the moments [2C,1,H,W] of the clean first frame; image-to-video only."""
        clip = self.rows[row]
        return self._read(self._latents, clip.latent_key, clip)["image_moments"][0].clone()

    def _read(self, reader: SampleReader, key: str, row: ViewRow) -> dict[str, Tensor]:
        """Read a sample's tensors; raises `CacheError` naming the clip, the sample and the fix."""
        try:
            return reader.read(key)
        except CacheError as error:
            raise CacheError(f"{clip_label(row)}: {error}") from None

    def _example(
        self,
        row: ViewRow,
        draw: str,
        latents: Tensor,
        noise: Tensor,
        timestep: int,
        embeds: Tensor,
        condition: Tensor | None,
    ) -> Example:
        step = torch.tensor(timestep)
        noisy = add_noise(latents, noise, step, self._schedule)
        target = velocity(latents, noise, step, self._schedule)
        if condition is not None:
            noisy = torch.cat([noisy, condition], dim=1)
        return Example(ModelInput(noisy, embeds, step), target, clip_label(row), draw)

    def _scaled(self, unscaled: Tensor) -> Tensor:
        """Scale [C,F,H,W] to latents [F,C,H,W], padded in front where the checkpoint needs it."""
        return pad_front(unscaled.transpose(0, 1) * self._conventions.scaling_factor, self._conventions)

    def _draw_image(self, image_moments: Tensor, num_frames: int, *where: str | int) -> Tensor:
        """Turn [1+K,2C,1,H,W] into the condition [F,C,H,W] of one noised image (the clean one if K = 0), or zeros."""
        draw = seeding.generator("image", *where)
        number = int(draw.integers(1, len(image_moments))) if len(image_moments) > 1 else 0
        image = posterior_draw(image_moments[number], "image-posterior", *where).transpose(0, 1)
        condition = image_condition(image, num_frames, self._conventions)
        dropped = draw.random() < self._train.noised_image_dropout
        return torch.zeros_like(condition) if dropped else condition

    def _draw_prompt(self, row: ViewRow, *where: str | int) -> Tensor:
        """Draw one of the clip's captions by weight, or the empty prompt."""
        draw = seeding.generator("caption", *where)
        dropped = draw.random() < self._train.caption_dropout
        weights = torch.tensor(row.caption_weights, dtype=torch.float64).cumsum(0)
        chosen = int(torch.searchsorted(weights, draw.random() * float(weights[-1]), right=True))
        key = self._empty_prompt if dropped else row.prompt_keys[min(chosen, len(row.prompt_keys) - 1)]
        return self._read(self._prompts, key, row)["prompt_embeds"]


def posterior_draw(moments: Tensor, *where: str | int) -> Tensor:
    """Draw [C,...] in fp32 from [2C,...] mean and logvar. Source: diffusers `DiagonalGaussianDistribution`."""
    mean, logvar = moments.float().chunk(2)
    spread = logvar.clamp(-30.0, 20.0).mul(0.5).exp()
    return mean + spread * seeding.normal(tuple(mean.shape), *where)


def clip_label(row: ViewRow) -> str:
    """Return source and start of a clip, for messages."""
    return f"{row.source} at {row.start_seconds:.2f} s"

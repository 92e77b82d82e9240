"""Examples are pure functions of (seed, epoch, clip): draws, captions, dropout, timesteps, weights."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from bench.shards import write_shard
from shared import seeding
from shared.cache.collection import Collection
from shared.cache.shard import Sample
from shared.cache.storage import open_storage
from shared.cache.view import View, ViewRow, read_view
from shared.config import Config, Train
from shared.errors import CacheError
from shared.fingerprint import key_of
from shared.model.geometry import Bucket, latent_shape
from tests import tiny
from tests.train.transformer.parity import conventions_of
from train.data.dataset import Dataset, posterior_draw
from train.data.example import Example
from train.data.order import Draw, global_batch
from train.objective import NoiseSchedule, min_snr_weight, read_schedule, schedule_from

NUM_SHARDS, PER_SHARD = 16, 8
Settings = Callable[..., Config]
BUCKET = Bucket(9, 32, 48)
CAPTIONS = (key_of("first"), key_of("second"), key_of("third"))
WEIGHTS = (1.0, 3.0, 0.0)


def dataset(folder: Path, variant: str = "2b", repeats: int = 1, loss_weight: float = 1, **values: Any) -> Dataset:
    """One clip with three captions; each prompt is filled with its number (0 is the empty one), images are ones."""
    conventions = conventions_of(variant)
    storage = open_storage(str(folder), local_cache_gib=1)
    latents, prompts = Collection("latents", key_of("latents")), Collection("prompts", key_of("prompts"))
    channels, *size = latent_shape(BUCKET, 16)
    moments = torch.cat([torch.zeros(channels, *size), torch.full((channels, *size), -30.0)])
    image = torch.cat([torch.ones(3, channels, 1, *size[1:]), torch.full((3, channels, 1, *size[1:]), -30.0)], dim=1)
    image *= torch.tensor([10.0, 1.0, 2.0]).view(3, 1, 1, 1, 1)
    image[:, channels:] = -30.0
    tensors = {"moments": moments} | ({"image_moments": image} if conventions.image_to_video else {})
    clip = key_of("clip")
    write_shard(storage, latents.folder, [Sample(clip, tensors, {})])
    shape = (conventions.text_length, conventions.text_embed_dim)
    texts = [key_of(""), *CAPTIONS]
    samples = [Sample(key, {"prompt_embeds": torch.full(shape, float(index))}, {}) for index, key in enumerate(texts)]
    write_shard(storage, prompts.folder, samples)
    row = ViewRow("a.mp4", 0.0, 1.0, 9, 32, 48, False, clip, ("", "", ""), WEIGHTS, CAPTIONS, (0, 0, 0), "train", "")
    row = replace(row, repeats=repeats, loss_weight=loss_weight)
    view = View("view", latents, prompts, {"": texts[0]}, (row,))
    train = Train(output_dir=folder, **values)
    return Dataset(storage, view, "train", conventions, read_schedule(tiny.scheduler_config(variant)), train)


def example(data: Dataset, epoch: int) -> Example:
    draw = Draw(epoch, 0)
    return data.example(draw, *data.timesteps([draw], 0))


def captions(data: Dataset, epochs: int = 200) -> list[int]:
    return [int(example(data, epoch).model_input.prompt_embeds[0, 0]) for epoch in range(epochs)]


def test_a_repetition_draws_its_own_noise_and_timestep(tmp_path: Path) -> None:
    data, once = dataset(tmp_path, repeats=3), dataset(tmp_path)
    assert data.places == [(0, 0), (0, 1), (0, 2)]
    draws = [Draw(5, *place) for place in data.places]
    first, *others = (data.example(draw, 500) for draw in draws)
    assert all(not torch.equal(other.target, first.target) and other.draw != first.draw for other in others)
    assert len(set(data.timesteps(draws, 0))) == 3
    only = once.example(Draw(5, 0), 500)
    assert torch.equal(first.target, only.target) and first.draw == only.draw


def test_a_rows_loss_weight_multiplies_its_loss(tmp_path: Path) -> None:
    usual, weighted = (example(dataset(tmp_path, snr_gamma=5.0, loss_weight=weight), 0) for weight in (1.0, 0.25))
    assert weighted.weight == 0.25 * usual.weight
    assert torch.equal(weighted.target, usual.target)


def test_captions_come_as_often_as_their_weights_say(tmp_path: Path) -> None:
    drawn = captions(dataset(tmp_path))
    assert drawn.count(2) / len(drawn) == pytest.approx(0.75, abs=0.08)
    assert drawn.count(0) == drawn.count(3) == 0
    assert drawn == captions(dataset(tmp_path))
    assert drawn != captions(dataset(tmp_path, seed=7))
    dropping = dataset(tmp_path, caption_dropout=0.3)
    dropped = captions(dropping)
    assert dropped.count(0) / len(dropped) == pytest.approx(0.3, abs=0.08)
    assert all(caption in (0, other) for caption, other in zip(dropped, drawn, strict=True))
    left, right = example(dropping, 0), example(dataset(tmp_path), 0)
    assert torch.equal(left.model_input.latents, right.model_input.latents) and torch.equal(left.target, right.target)


def test_noised_images_are_drawn_and_dropped_as_often_as_asked(tmp_path: Path) -> None:
    def conditions(noised_image_dropout: float) -> list[float]:
        data = dataset(tmp_path, "5b-i2v", noised_image_dropout=noised_image_dropout)
        return [float(example(data, epoch).model_input.latents[0, 16, 0, 0]) for epoch in range(200)]

    scale = conventions_of("5b-i2v").image_scaling_factor
    assert {round(value / scale) for value in conditions(0.0)} == {1, 2}
    assert not any(conditions(1.0))
    drawn = conditions(0.3)
    assert drawn.count(0.0) / len(drawn) == pytest.approx(0.3, abs=0.08)


def test_every_draw_is_keyed_by_kind_seed_epoch_and_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[tuple[str | int, ...]] = []
    generator = seeding.generator

    def recorded(*parts: str | int) -> np.random.Generator:
        names.append(parts)
        return generator(*parts)

    monkeypatch.setattr(seeding, "generator", recorded)
    one = example(dataset(tmp_path, "5b-i2v", seed=3), epoch=5)
    assert {name[1:] for name in names} == {(3, 5, key_of("clip"))}
    kinds = {name[0] for name in names}
    assert kinds == {"caption", "image", "image-posterior", "noise", "posterior", "timestep"}
    assert len(names) == len(kinds)
    assert one.draw == f"5:{key_of('clip')}", "which names the adapter's dropout"


def timesteps(data: Dataset, size: int, steps: int) -> torch.Tensor:
    """Return [steps, size] for batches of one clip in `size` epochs each."""
    batches = [[Draw(step * size + index, 0) for index in range(size)] for step in range(steps)]
    return torch.tensor([data.timesteps(batch, step) for step, batch in enumerate(batches)])


def test_stratified_timesteps_cover_every_part(tmp_path: Path) -> None:
    data = dataset(tmp_path, timestep_sampling="stratified", seed=1)
    drawn = timesteps(data, 8, 500)
    assert torch.equal(drawn.div(125, rounding_mode="floor").sort().values, torch.arange(8).expand(500, 8))
    # Each place of the batch meets every part, so each clip's timestep is uniform by itself.
    assert float(drawn[:, 0].float().mean()) == pytest.approx(499.5, abs=40)
    assert drawn.flatten().min() < 10 and drawn.flatten().max() > 989
    uniform = timesteps(dataset(tmp_path), 8, 500).flatten()
    assert uniform.min() < 10 and uniform.max() > 989 and float(uniform.float().mean()) == pytest.approx(499.5, abs=15)
    assert int(timesteps(data, 3, 400).max()) <= 999


def test_min_snr_weights_are_the_published_ones(tmp_path: Path) -> None:
    """Hang et al. 2023: min(SNR, gamma) / (SNR + 1) for velocities."""
    schedule: NoiseSchedule = schedule_from(torch.tensor([0.999, 0.9, 0.5, 0.1, 0.0]))
    for timestep, abar in enumerate((0.999, 0.9, 0.5, 0.1, 0.0)):
        snr = abar / (1 - abar)
        assert min_snr_weight(timestep, schedule, 5.0) == pytest.approx(min(snr, 5) / (snr + 1), rel=1e-4, abs=1e-12)
    assert example(dataset(tmp_path), 0).weight == 1
    data = dataset(tmp_path, snr_gamma=5.0)
    (timestep,) = data.timesteps([Draw(0, 0)], 0)
    expected = min_snr_weight(timestep, read_schedule(tiny.scheduler_config("2b")), 5.0)
    weighted = example(data, 0)
    assert weighted.weight == expected
    assert weighted.to(torch.device("cpu"), torch.bfloat16).weight == expected


def test_a_held_out_example_depends_on_clip_and_timestep(tmp_path: Path) -> None:
    one, other = (
        dataset(tmp_path, seed=1, caption_dropout=1.0).fixed_example(0, 500),
        dataset(tmp_path).fixed_example(0, 500),
    )
    assert torch.equal(one.model_input.latents, other.model_input.latents)
    assert torch.equal(one.model_input.prompt_embeds, other.model_input.prompt_embeds)
    assert not torch.equal(one.target, dataset(tmp_path).fixed_example(0, 501).target)


def test_a_held_out_example_has_first_caption_and_clean_image(tmp_path: Path) -> None:
    data = dataset(tmp_path, "5b-i2v", noised_image_dropout=1.0)
    shown = data.fixed_example(0, 500).model_input
    image = torch.full((16, *shown.latents.shape[2:]), 10 * conventions_of("5b-i2v").image_scaling_factor)
    torch.testing.assert_close(shown.latents[0, 16:], image)
    assert int(shown.prompt_embeds[0, 0]) == 1
    assert (data.first_frame_moments(0)[:16] == 10).all()


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Callable[..., Dataset]]:
    """Many shards of clips with a caption each, half as many of prompts, behind a URL; `room` counts latents shards."""
    from fsspec.implementations.memory import MemoryFileSystem

    conventions = conventions_of("2b")
    latents, prompts = Collection("latents", key_of("latents")), Collection("prompts", key_of("prompts"))
    storage = open_storage("memory://data/cache", local_folder=tmp_path / "copies")
    channels, *size = latent_shape(BUCKET, 16)
    moments = torch.zeros(2 * channels, *size)
    embeds = torch.zeros(conventions.text_length, conventions.text_embed_dim)
    texts = [key_of(["caption", number]) for number in range(NUM_SHARDS * PER_SHARD)]
    rows, shard_bytes = [], 0
    for number in range(NUM_SHARDS):
        keys = [key_of([number, clip]) for clip in range(PER_SHARD)]
        samples = [Sample(key, {"moments": moments}, {}) for key in keys]
        shard_bytes = write_shard(storage, latents.folder, samples)[0].size
        own = texts[number * PER_SHARD : (number + 1) * PER_SHARD]
        rows += [
            ViewRow("a.mp4", 0.0, 1.0, 9, 32, 48, False, key, ("",), (1.0,), (text,), (0,), "train", "")
            for key, text in zip(keys, own, strict=True)
        ]
    for number in range(0, len(texts), 2 * PER_SHARD):
        chosen = [*texts[number : number + 2 * PER_SHARD], *([key_of("")] if number == 0 else [])]
        write_shard(storage, prompts.folder, [Sample(key, {"prompt_embeds": embeds}, {}) for key in chosen])

    def make(room: float, split: Literal["train", "held_out"] = "train", **values: Any) -> Dataset:
        storage = open_storage(
            "memory://data/cache", local_cache_gib=room * shard_bytes / 2**30, local_folder=tmp_path / "copies"
        )
        view = View("view", latents, prompts, {"": key_of("")}, tuple(replace(row, split=split) for row in rows))
        train = Train(output_dir=tmp_path, **values)
        return Dataset(storage, view, split, conventions, read_schedule(tiny.scheduler_config("2b")), train)

    yield make
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def test_latents_are_drawn_as_diffusers_draws_them() -> None:
    mean, logvar = seeding.normal((2, 4, 3, 2, 2), "moments") * torch.tensor([1.0, 20.0]).view(2, 1, 1, 1, 1)
    moments = torch.cat([mean, logvar])
    posterior = DiagonalGaussianDistribution(moments[None])
    expected = posterior.mean[0] + posterior.std[0] * seeding.normal(tuple(mean.shape), "a", 1)
    assert logvar.min() < -30 and logvar.max() > 20
    torch.testing.assert_close(posterior_draw(moments, "a", 1), expected, rtol=1e-6, atol=0)


def downloads_of_an_epoch(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """By kind: latents or prompts."""
    from fsspec.implementations.memory import MemoryFileSystem

    fetched: Counter[str] = Counter()
    fetch = MemoryFileSystem.get_file

    def counted(self: Any, name: str, *arguments: Any, **options: Any) -> Any:
        fetched[name.split("/")[-3]] += 1
        return fetch(self, name, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", counted)
        for step in range(len(data.rows) // 4):
            for draw in global_batch("view", 7, data.places, 4, step, data.windows()):
                data.example(draw, 10)
    return fetched


@pytest.mark.parametrize(("room", "size"), [(2, 1), (5, 3), (13, 3)])
def test_each_shard_is_fetched_once_per_epoch(
    room: int, size: int, remote: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for thirteen, the prompts' shards (the space of six) are kept whole beside the latents'."""
    data = remote(room)
    windows = data.windows()
    assert windows is not None and windows.num_shards == size
    fetched = downloads_of_an_epoch(data, monkeypatch)
    assert fetched["latents"] == NUM_SHARDS
    assert fetched["prompts"] == (NUM_SHARDS // 2 if room == 13 else 0)


def test_the_window_can_be_chosen(remote: Callable[..., Dataset], tmp_path: Path) -> None:
    for room in (2, 1000):
        windows = remote(room, shuffle_shards=4).windows()
        assert windows is not None and windows.num_shards == 4
        assert remote(room, shuffle_shards=NUM_SHARDS).windows() is None
    assert dataset(tmp_path / "folder").windows() is None


def test_held_out_clips_are_read_alone(remote: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    held_out, trained = remote(2, split="held_out"), remote(2)
    assert torch.equal(held_out.fixed_example(3, 10).target, trained.fixed_example(3, 10).target)
    assert downloads_of_an_epoch(held_out, monkeypatch).total() == 0


def test_samples_of_other_shapes_are_refused_by_name(experiment: Config, settings: Settings) -> None:
    storage = open_storage(experiment.precompute.cache, local_cache_gib=1)
    view, conventions = read_view(storage, "clips"), conventions_of("2b")
    turned = replace(view, rows=tuple(replace(row, height=row.width, width=row.height) for row in view.rows))
    schedule = read_schedule(tiny.scheduler_config("2b"))
    for table, taken, line in (
        (turned, conventions, r"expected moments \(32, .*\), got \(32, "),
        (view, replace(conventions, image_to_video=True), "the cache was made for text-to-video"),
        (view, replace(conventions, text_length=20), r"expected prompt_embeds \(20, 32\), got \(16, 32\)"),
    ):
        with pytest.raises(CacheError, match=rf"\.mp4 at \d+\.\d\d s: {line}"):
            Dataset(storage, table, "train", taken, schedule, settings().train)

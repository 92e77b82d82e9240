"""The objective against the checkpoints' own schedulers, and what a network that is exactly right would show."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.shards import write_shard
from shared import seeding
from shared.cache.collection import Collection
from shared.cache.shard import Sample
from shared.cache.storage import LocalStorage
from shared.cache.view import View, ViewRow
from shared.config import Train
from shared.errors import UsageError
from shared.fingerprint import key_of
from shared.model.conventions import Conventions, read_conventions
from shared.model.geometry import Bucket, latent_shape
from tests.tiny import TEXT_LENGTH, TEXT_WIDTH, build_scheduler, scheduler_config, transformer_config, vae_config
from train.data.dataset import Dataset
from train.objective import NoiseSchedule, add_noise, clip_loss, read_schedule, velocity

TIMESTEPS = [*range(0, 999, 37), 999]
BUCKET = Bucket(9, 64, 96)
SCHEDULERS = {"DDIM, snr_shift 3 (2B)": "2b", "DPM, snr_shift 1 (5B)": "5b"}


@pytest.fixture(params=list(SCHEDULERS.values()), ids=list(SCHEDULERS))
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def abar_by_hand(config: dict[str, Any]) -> Tensor:
    """abar [T] in float64 from the formulas: scaled-linear betas, SNR shift, zero terminal SNR."""
    betas = torch.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0)
    abar = abar / (config["snr_shift_scale"] + (1 - config["snr_shift_scale"]) * abar)
    root = abar.sqrt()
    first, last = root[0].clone(), root[-1].clone()
    result: Tensor = ((root - last) * first / (first - last)).square()
    return result


def test_schedule_is_the_checkpoints_own(variant: str) -> None:
    schedule = read_schedule(scheduler_config(variant))
    abar = build_scheduler(variant).alphas_cumprod.double()
    torch.testing.assert_close(abar, abar_by_hand(scheduler_config(variant)), rtol=1e-6, atol=1e-9)
    assert len(schedule) == 1000
    assert schedule.signal.dtype == schedule.noise.dtype == torch.float32
    assert torch.equal(schedule.signal, abar.sqrt().float())
    assert torch.equal(schedule.noise, (1 - abar).sqrt().float())
    assert schedule.signal[-1] == 0 and schedule.noise[-1] == 1, "the last step is pure noise"


def test_noise_and_velocity_equal_the_schedulers_in_float64(variant: str) -> None:
    scheduler = build_scheduler(variant)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    abar = scheduler.alphas_cumprod
    schedule = NoiseSchedule(abar.sqrt(), (1 - abar).sqrt())
    latents, noise = (seeding.normal((3, 16, 4, 6), "test", name).double() for name in ("latents", "noise"))
    for timestep in map(torch.tensor, TIMESTEPS):
        expected = scheduler.add_noise(latents, noise, timestep)
        torch.testing.assert_close(add_noise(latents, noise, timestep, schedule), expected, rtol=1e-14, atol=1e-14)
        expected = scheduler.get_velocity(latents, noise, timestep)
        torch.testing.assert_close(velocity(latents, noise, timestep, schedule), expected, rtol=1e-14, atol=1e-14)


def test_loss_is_the_mean_square_in_fp32() -> None:
    target = seeding.normal((3, 16, 4, 4), "target")
    prediction = (target + 0.25).bfloat16()
    expected = (prediction.double() - target.double()).square().mean()
    loss = clip_loss(prediction, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    assert clip_loss(prediction.double(), target).dtype == torch.float64


def test_scheduler_of_another_family_is_refused() -> None:
    with pytest.raises(UsageError, match="expected _class_name CogVideoXDDIMScheduler or"):
        read_schedule(scheduler_config("2b") | {"_class_name": "FlowMatchEulerDiscreteScheduler"})


def test_a_perfect_network_has_no_loss_in_bf16(variant: str, tmp_path: Path) -> None:
    """Check that bf16 leaves only the rounding of the network's own answer; bf16 targets already cost 6e-6."""
    dataset, moments, conventions = bf16_dataset(variant, tmp_path)
    abar = build_scheduler(variant).alphas_cumprod.double()
    latents = moments.chunk(2)[0].double().transpose(0, 1) * conventions.scaling_factor
    for timestep in TIMESTEPS:
        example = dataset.fixed_example(0, timestep).to(torch.device("cpu"), torch.bfloat16)
        assert example.model_input.latents.dtype == example.model_input.prompt_embeds.dtype == torch.bfloat16
        noise = seeding.normal(tuple(latents.shape), "held-out", "a" * 32, timestep)
        truth = abar[timestep].sqrt() * noise.double() - (1 - abar[timestep]).sqrt() * latents
        assert float(clip_loss(truth.bfloat16(), example.target)) < 5e-6


def bf16_dataset(variant: str, folder: Path) -> tuple[Dataset, Tensor, Conventions]:
    """Return a data set of one clip in a real cache, its moments [2C,F,H,W] in bf16, and the conventions."""
    storage = LocalStorage(str(folder))
    latents, prompts = Collection("latents", key_of("latents")), Collection("prompts", key_of("prompts"))
    channels, *size = latent_shape(BUCKET)
    moments = seeding.normal((2 * channels, *size), "moments").bfloat16()
    embeds = seeding.normal((TEXT_LENGTH, TEXT_WIDTH), "embeds").bfloat16()
    key, text = "a" * 32, "b" * 32
    write_shard(storage, f"{latents.folder}/{BUCKET}", [Sample(key, {"moments": moments}, {})])
    write_shard(storage, prompts.folder, [Sample(text, {"prompt_embeds": embeds}, {})])
    row = ViewRow("x.mp4", 0, 1, 9, 64, 96, False, key, ("",), (1.0,), (text,), (0,), "train", "")
    view = View("test", latents, prompts, {"": text}, (row,))
    conventions = read_conventions(transformer_config(variant), vae_config(variant), scheduler_config(variant))
    train = Train(output_dir=folder / "run")
    return (
        Dataset(storage, view, "train", conventions, read_schedule(scheduler_config(variant)), train),
        moments,
        conventions,
    )

"""The choice of a memory mode against counted bytes of the published sizes."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from torch import nn

from bench.models import PUBLISHED, published_conventions
from bench.sample_memory import VAE, decoder_sizes, transformer_sizes
from sample.memory import activation_bytes, choose_memory, needed_bytes
from shared.config import Sampling
from shared.model.geometry import Bucket

GIB = 2**30


@pytest.fixture(scope="module")
def pipeline() -> SimpleNamespace:
    """Return a 5B on the meta device."""
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel.from_config(PUBLISHED["5b"])
        vae = AutoencoderKLCogVideoX(**VAE)
    for part in (transformer, vae):
        nn.Module.to(part.requires_grad_(False), torch.bfloat16)
    return SimpleNamespace(transformer=transformer, vae=vae)


def test_estimated_activations_are_the_counted_ones(pipeline: SimpleNamespace) -> None:
    bucket, settings = Bucket(49, 480, 720), Sampling()
    denoise, decode = activation_bytes(pipeline, settings, published_conventions("5b"), False, 2)
    assert denoise == pytest.approx(transformer_sizes("5b", bucket)["activations"], rel=0.02)
    assert decode == pytest.approx(decoder_sizes(bucket, tiled=False)["activations"], rel=0.02)


def test_needed_memory_is_that_of_the_table(pipeline: SimpleNamespace) -> None:
    """The figures of docs/memory.md for 5B with tiles."""
    needed = needed_bytes(pipeline, Sampling(), published_conventions("5b"), True)
    table = {"none": 14.5, "model_offload": 13.0, "group_offload": 4.2, "sequential_offload": 3.8}
    assert {name: size / GIB for name, size in needed.items()} == pytest.approx(table, abs=0.3)


@pytest.mark.parametrize(
    ("free", "mode"),
    [
        (80, "none"),
        (15.2, "model_offload"),
        (12, "group_offload"),
        (5.0, "sequential_offload"),
        (2, "sequential_offload"),
    ],
)
def test_fastest_mode_that_fits_is_chosen_and_explained(free: float, mode: str) -> None:
    needed = {"none": 15, "model_offload": 13, "group_offload": 4.2, "sequential_offload": 3.8}
    chosen, reason = choose_memory({name: int(size * GIB) for name, size in needed.items()}, free * GIB)
    assert chosen == mode and "none 15.0 GiB, model_offload 13.0 GiB" in reason and f"{free:.1f} GiB free" in reason

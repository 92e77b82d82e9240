"""Packs of random clips, and one forward and backward over them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models import embeddings
from torch import Tensor

from shared.model.conventions import Conventions, read_conventions
from tests.tiny import TEXT_LENGTH, TEXT_WIDTH, scheduler_config, transformer_config, vae_config
from train.data.conditioning import pad_front
from train.transformer.forward import ModelInput

Gradients = dict[str, Tensor]


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


SHAPES = [(3, 8, 12), (1, 8, 8), (2, 12, 8), (5, 4, 16), (1, 16, 4)]
"""Latent frames, rows and columns of five clips, images among them."""


def conventions_of(variant: str) -> Conventions:
    return read_conventions(transformer_config(variant), vae_config(variant), scheduler_config(variant))


def make_clip(conventions: Conventions, shape: tuple[int, int, int], seed: int, dtype: torch.dtype) -> ModelInput:
    generator = torch.Generator().manual_seed(seed)
    frames, height, width = shape
    latents = torch.randn(frames, conventions.in_channels, height, width, generator=generator, dtype=torch.float64)
    text_length = TEXT_LENGTH if conventions.text_length_fixed else 7 + 3 * seed
    prompt_embeds = torch.randn(text_length, TEXT_WIDTH, generator=generator, dtype=torch.float64)
    timestep = torch.randint(1000, (), generator=generator)
    return ModelInput(pad_front(latents, conventions).to(dtype), prompt_embeds.to(dtype), timestep)


def make_clips(conventions: Conventions, dtype: torch.dtype, count: int = 5) -> list[ModelInput]:
    learned = conventions.positions == "rope_crop_learned"
    shapes = [SHAPES[0]] * count if learned else SHAPES[:count]
    return [make_clip(conventions, shape, seed, dtype) for seed, shape in enumerate(shapes)]


@contextmanager
def float64_rotary(dtype: torch.dtype) -> Iterator[None]:
    """Let diffusers rotate float64 queries and keys in float64, where it always uses float32."""
    original, to_float = embeddings.apply_rotary_emb, torch.Tensor.float

    def apply_in_own_dtype(tokens: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        torch.Tensor.float = lambda self: self  # type: ignore[method-assign, assignment, return-value]
        try:
            rotated: Tensor = original(tokens, table)
            return rotated
        finally:
            torch.Tensor.float = to_float  # type: ignore[method-assign]

    if dtype == torch.float64:
        embeddings.apply_rotary_emb = apply_in_own_dtype
    try:
        yield
    finally:
        embeddings.apply_rotary_emb = original


def run(
    transformer: CogVideoXTransformer3DModel, forward: Callable[[], list[Tensor]]
) -> tuple[list[Tensor], Tensor, Gradients]:
    """Return velocities, the mean of their square errors against fixed targets, and the adapters' gradients."""
    transformer.zero_grad()
    velocities = forward()
    errors = []
    for seed, velocity in enumerate(velocities):
        generator = torch.Generator().manual_seed(100 + seed)
        target = torch.randn(velocity.shape, generator=generator, dtype=torch.float64)
        errors.append((velocity.double() - target.to(velocity.device)).square().mean())
    loss = torch.stack(errors).mean()
    loss.backward()
    gradients = {}
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            gradients[name] = parameter.grad.clone()
    return [velocity.detach() for velocity in velocities], loss.detach(), gradients


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest error relative to the largest value."""
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-30))


def largest_difference(ours: Gradients, theirs: Gradients) -> float:
    assert ours.keys() == theirs.keys() and ours
    assert all(gradient.any() for gradient in theirs.values()), "a gradient that is zero tests nothing"
    return max(difference(ours[name], theirs[name]) for name in theirs)


EVERY_LINEAR = (
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear", "norm2.linear"),
    *("norm_out.linear", "proj_out", "text_proj", "patch_embed.proj", "time_embedding.linear_1"),
)

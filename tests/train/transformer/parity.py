"""Set-up for parity with diffusers: clips, plans, a step's results, and how far two of them differ."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models import embeddings
from torch import Tensor

from bench.reference import predict_reference
from shared.model.conventions import Conventions, read_conventions
from tests.tiny import TEXT_LENGTH, TEXT_WIDTH, scheduler_config, transformer_config, vae_config
from train.data.example import ModelInput, pad_front
from train.transformer.engine import EVERYTHING_RESIDENT, Engine, Plan, open_engine
from train.transformer.forward import predict

Gradients = dict[str, Tensor]
Results = tuple[list[Tensor], Tensor, Gradients]
CPU = torch.device("cpu")
LEAN = Plan("attention_output", offload_activations=True, stream_weights=2)
PLANS = {
    "full": Plan("full"),
    "attention_output": Plan("attention_output"),
    "block_input": Plan("block_input"),
    "mixed": Plan("attention_output", full_blocks=1),
    "offload": replace(LEAN, stream_weights=0),
    "stream": replace(LEAN, offload_activations=False),
    "lean": LEAN,
    "lean-block_input": replace(LEAN, activations="block_input"),
    "lean-full": replace(LEAN, activations="full"),
}
EVERY_LINEAR = (
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear", "norm2.linear"),
    *("norm_out.linear", "proj_out", "text_proj", "patch_embed.proj", "time_embedding.linear_1"),
)
"""Targets of an adapter on every linear layer of a transformer."""
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
SHAPES = [(3, 8, 12), (1, 8, 8), (2, 12, 8), (5, 4, 16), (1, 16, 4)]
"""Latent frames, rows and columns of five clips, images among them."""


def conventions_of(variant: str) -> Conventions:
    """Return the conventions of a tiny variant."""
    return read_conventions(transformer_config(variant), vae_config(variant), scheduler_config(variant))


def make_clip(conventions: Conventions, shape: tuple[int, int, int], seed: int, dtype: torch.dtype) -> ModelInput:
    """Return a random clip of `shape` latent frames, rows and columns."""
    generator = torch.Generator().manual_seed(seed)
    frames, height, width = shape
    latents = torch.randn(frames, conventions.in_channels, height, width, generator=generator, dtype=torch.float64)
    text_length = TEXT_LENGTH if conventions.text_length_fixed else 7 + 3 * seed
    prompt_embeds = torch.randn(text_length, TEXT_WIDTH, generator=generator, dtype=torch.float64)
    timestep = torch.randint(1000, (), generator=generator)
    return ModelInput(pad_front(latents, conventions).to(dtype), prompt_embeds.to(dtype), timestep)


def make_clips(conventions: Conventions, dtype: torch.dtype, count: int = 5) -> list[ModelInput]:
    """Return clips of mixed shapes, or of one shape where a learned table allows no other."""
    learned = conventions.positions == "rope_crop_learned"
    shapes = [SHAPES[0]] * count if learned else SHAPES[:count]
    return [make_clip(conventions, shape, seed, dtype) for seed, shape in enumerate(shapes)]


@contextmanager
def float64_rotary(dtype: torch.dtype) -> Iterator[None]:
    """Let diffusers rotate queries and keys in float64 where the model is; it always uses float32."""
    original = embeddings.apply_rotary_emb

    def apply_in_own_dtype(tokens: Tensor, table: tuple[Tensor, Tensor]) -> Any:
        with patch.object(torch.Tensor, "float", lambda self: self):
            return original(tokens, table)

    if dtype == torch.float64:
        embeddings.apply_rotary_emb = apply_in_own_dtype
    try:
        yield
    finally:
        embeddings.apply_rotary_emb = original


def run(transformer: CogVideoXTransformer3DModel, forward: Callable[[], list[Tensor]]) -> Results:
    """Return velocities, the mean over clips of their mean square error, and every adapter's gradient."""
    transformer.zero_grad()
    velocities = forward()
    errors = []
    for seed, velocity in enumerate(velocities):
        generator = torch.Generator().manual_seed(100 + seed)
        target = torch.randn(velocity.shape, generator=generator, dtype=torch.float64)
        errors.append((velocity.double() - target.to(velocity.device)).square().mean())
    loss = torch.stack(errors).mean()
    torch.autograd.backward(loss)
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
    """Return the largest `difference` of all gradients, none of which may be zero."""
    assert ours.keys() == theirs.keys() and ours
    assert all(gradient.any() for gradient in theirs.values()), "a gradient that is zero tests nothing"
    return max(difference(ours[name], theirs[name]) for name in theirs)


def expected_results(
    transformer: CogVideoXTransformer3DModel, conventions: Conventions, clips: list[ModelInput]
) -> Results:
    """Return the results of diffusers' forward with peft's layers."""
    with float64_rotary(clips[0].latents.dtype):
        return run(transformer, lambda: predict_reference(transformer, clips, conventions))


def assert_like_diffusers(
    transformer: CogVideoXTransformer3DModel,
    conventions: Conventions,
    clips: list[ModelInput],
    plan: Plan | None = None,
) -> Engine:
    """Check velocities, loss and every adapter's gradient; return the engine of `plan`."""
    expected = expected_results(transformer, conventions, clips)
    engine = EVERYTHING_RESIDENT if plan is None else open_engine(transformer, plan, CPU)
    for _ in range(1 if plan is None else 2):  # the second time, buffers are used again
        assert_close(run(transformer, lambda: predict(transformer, clips, conventions, engine)), expected)
    return engine


def assert_close(found: Results, expected: Results) -> None:
    """Check that two results of `run` differ by rounding alone."""
    tolerance = TOLERANCE[expected[0][0].dtype]
    assert max(difference(one, other) for one, other in zip(found[0], expected[0], strict=True)) < tolerance
    assert difference(found[1], expected[1]) < tolerance
    assert largest_difference(found[2], expected[2]) < tolerance

"""Our forward over packs against diffusers' own forward with peft's own layers, one clip at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models import embeddings
from torch import Tensor

from shared.model.conventions import Conventions, drop_learned_table, read_conventions, without_learned_positions
from tests.tiny import (
    TEXT_LENGTH,
    TEXT_WIDTH,
    VARIANTS,
    add_lora,
    build_transformer,
    scheduler_config,
    transformer_config,
    vae_config,
)
from train.data.conditioning import pad_front
from train.transformer.engine import Engine
from train.transformer.forward import ModelInput, linear, predict, predict_reference
from train.transformer.positions import image_rotary_emb

Gradients = dict[str, Tensor]
RECOMPUTING = Engine(activations="block_input")
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
    """diffusers turns queries and keys in float32 whatever their dtype; this lifts that for a float64 comparison."""
    original, to_float = embeddings.apply_rotary_emb, torch.Tensor.float

    def apply_in_own_dtype(tokens: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        torch.Tensor.float = lambda self: self
        try:
            return original(tokens, table)
        finally:
            torch.Tensor.float = to_float

    if dtype == torch.float64:
        embeddings.apply_rotary_emb = apply_in_own_dtype
    try:
        yield
    finally:
        embeddings.apply_rotary_emb = original


def run(
    transformer: CogVideoXTransformer3DModel, forward: Callable[[], list[Tensor]]
) -> tuple[list[Tensor], Tensor, Gradients]:
    """Velocities, the mean over clips of their mean square error against a fixed target, every adapter's gradient."""
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
    """Largest error relative to the largest value."""
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-30))


def largest_difference(ours: Gradients, theirs: Gradients) -> float:
    assert ours.keys() == theirs.keys() and ours
    assert all(gradient.any() for gradient in theirs.values()), "a gradient that is zero tests nothing"
    return max(difference(ours[name], theirs[name]) for name in theirs)


def assert_like_diffusers(
    transformer: CogVideoXTransformer3DModel, conventions: Conventions, clips: list[ModelInput]
) -> None:
    dtype = clips[0].latents.dtype
    with float64_rotary(dtype):
        expected, expected_loss, expected_gradients = run(
            transformer, lambda: predict_reference(transformer, clips, conventions)
        )
    velocities, loss, gradients = run(transformer, lambda: predict(transformer, clips, conventions))
    worst = max(difference(ours, theirs) for ours, theirs in zip(velocities, expected, strict=True))
    assert worst < TOLERANCE[dtype]
    assert difference(loss, expected_loss) < TOLERANCE[dtype]
    assert largest_difference(gradients, expected_gradients) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_pack_of_one_clip_equals_diffusers(variant: str, dtype: torch.dtype) -> None:
    conventions = conventions_of(variant)
    transformer = build_transformer(variant, dtype, lora_rank=4)
    assert_like_diffusers(transformer, conventions, make_clips(conventions, dtype, 1))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_pack_of_mixed_clips_equals_diffusers_one_by_one(variant: str, dtype: torch.dtype) -> None:
    conventions = conventions_of(variant)
    transformer = build_transformer(variant, dtype, lora_rank=4)
    assert_like_diffusers(transformer, conventions, make_clips(conventions, dtype))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_i2v_without_its_learned_table_runs_at_any_shape(dtype: torch.dtype) -> None:
    conventions = without_learned_positions(conventions_of("5b-i2v"))
    transformer = build_transformer("5b-i2v", dtype, lora_rank=4)
    drop_learned_table(transformer)
    assert_like_diffusers(transformer, conventions, make_clips(conventions, dtype))


def test_model_and_conventions_cannot_disagree_about_the_learned_table() -> None:
    conventions = without_learned_positions(conventions_of("5b-i2v"))
    transformer = build_transformer("5b-i2v")
    with pytest.raises(AssertionError, match="differ"):
        predict_reference(transformer, make_clips(conventions, torch.float32, 1), conventions)


def test_learned_table_is_never_swapped_for_another_frame_count() -> None:
    conventions = conventions_of("5b-i2v")
    transformer = build_transformer("5b-i2v")
    clip = make_clip(conventions, (2, 8, 12), 0, torch.float32)
    predict_reference(transformer, [clip], conventions)  # diffusers puts sincos positions in its place without a word
    with pytest.raises(AssertionError, match="learned table"):
        predict(transformer, [clip], conventions)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_follows_fp32_and_its_adapters_get_fp32_gradients(variant: str) -> None:
    conventions = conventions_of(variant)
    transformer = build_transformer(variant, torch.bfloat16, lora_rank=4)
    clips = make_clips(conventions, torch.bfloat16)
    velocities, loss, gradients = run(transformer, lambda: predict(transformer, clips, conventions))
    assert all(velocity.dtype == torch.bfloat16 for velocity in velocities)
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients.values())

    wide = [ModelInput(clip.latents.float(), clip.prompt_embeds.float(), clip.timestep) for clip in clips]
    transformer.to(torch.float32)
    _, expected_loss, expected = run(transformer, lambda: predict_reference(transformer, wide, conventions))
    assert difference(loss, expected_loss) < 0.01
    joined, expected_joined = (torch.cat([g.flatten() for g in grads.values()]) for grads in (gradients, expected))
    assert torch.cosine_similarity(joined, expected_joined, dim=0) > 0.999


@pytest.mark.parametrize("variant", ["2b", "1.5-5b"])
def test_bf16_pack_keeps_no_fp32_copy_of_its_activations(variant: str) -> None:
    conventions = conventions_of(variant)
    transformer = build_transformer(variant, torch.bfloat16, lora_rank=4)
    clips = make_clips(conventions, torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        predict(transformer, clips, conventions)
    tokens = max(len(tensor) for tensor in kept if tensor.ndim == 2)
    rows = tokens * transformer.patch_embed.embed_dim
    assert any(tensor.numel() >= rows for tensor in kept)
    assert all(tensor.dtype == torch.bfloat16 for tensor in kept if tensor.numel() >= rows)


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputing_changes_nothing(variant: str) -> None:
    conventions = conventions_of(variant)
    transformer = build_transformer(variant)
    add_lora(transformer, 4, lora_dropout=0.3)
    transformer.train()
    clips = make_clips(conventions, torch.float32)
    results = []
    for recomputing in (False, True):
        torch.manual_seed(7)
        results.append(
            run(
                transformer,
                lambda on=recomputing: predict(transformer, clips, conventions, engine=RECOMPUTING if on else Engine()),
            )
        )
    (velocities, loss, gradients), (velocities_again, loss_again, gradients_again) = results
    assert loss == loss_again
    assert all(torch.equal(once, again) for once, again in zip(velocities, velocities_again, strict=True))
    assert largest_difference(gradients_again, gradients) < 1e-5


def test_recomputing_keeps_little_more_than_the_block_inputs() -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", lora_rank=4, num_layers=6)
    clips = make_clips(conventions, torch.float32)

    def kept(recomputing: bool) -> int:
        sizes: list[int] = []

        def keep(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            predict(transformer, clips, conventions, RECOMPUTING if recomputing else Engine())
        return sum(sizes)

    assert kept(True) < kept(False) / 5


def test_lora_dropout_acts_in_training_and_as_peft_does() -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b")
    add_lora(transformer, 4, lora_dropout=0.5)
    clips = make_clips(conventions, torch.float32, 1)

    def once(forward: Callable[..., list[Tensor]], seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return forward(transformer, clips, conventions)[0]

    still = once(predict, 1)
    assert torch.equal(still, once(predict, 2))
    transformer.train()
    assert difference(once(predict, 1), still) > 1e-3
    assert difference(once(predict, 2), once(predict, 1)) > 1e-3
    assert difference(once(predict, 1), once(predict_reference, 1)) < 1e-5


EVERY_LINEAR = (
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear", "norm2.linear"),
    *("norm_out.linear", "proj_out", "text_proj", "patch_embed.proj", "time_embedding.linear_1"),
)


@pytest.mark.parametrize("variant", ["2b", "5b-i2v", "1.5-5b-i2v"])
def test_adapters_on_every_linear_layer_equal_peft(variant: str) -> None:
    conventions = conventions_of(variant)
    transformer = build_transformer(variant, torch.float64)
    add_lora(transformer, 4, target_modules=EVERY_LINEAR)
    assert_like_diffusers(transformer, conventions, make_clips(conventions, torch.float64))


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}, {"lora_alpha": 3}],
    ids=["dora", "rslora", "lora_bias", "alpha"],
)
def test_other_kinds_of_adapters_equal_peft(options: dict[str, object]) -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", torch.float64)
    add_lora(transformer, 4, **options)
    assert_like_diffusers(transformer, conventions, make_clips(conventions, torch.float64))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["plain", "dora"])
def test_adapters_on_every_linear_layer_run_in_bf16(options: dict[str, object]) -> None:
    conventions = conventions_of("1.5-5b-i2v")
    transformer = build_transformer("1.5-5b-i2v", torch.bfloat16)
    add_lora(transformer, 4, target_modules=EVERY_LINEAR, **options)
    clips = make_clips(conventions, torch.bfloat16, 2)
    velocities, _, gradients = run(transformer, lambda: predict(transformer, clips, conventions))
    assert all(velocity.dtype == torch.bfloat16 and velocity.isfinite().all() for velocity in velocities)
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_two_adapters_add_up_as_in_peft() -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", torch.float64)
    add_lora(transformer, 4, adapter_name="first")
    add_lora(transformer, 2, seed=5, adapter_name="second")
    transformer.set_adapter(["first", "second"])
    assert_like_diffusers(transformer, conventions, make_clips(conventions, torch.float64))


def test_disabled_adapters_leave_the_base_model() -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", lora_rank=4)
    clips = make_clips(conventions, torch.float32)
    with torch.no_grad():
        adapted = predict(transformer, clips, conventions)
        transformer.disable_adapters()
        plain = predict(transformer, clips, conventions)
        base = predict(build_transformer("5b"), clips, conventions)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(plain, base, strict=True))
    assert all(difference(ours, theirs) > 1e-3 for ours, theirs in zip(adapted, base, strict=True))


def test_plain_lora_never_casts_its_input() -> None:
    transformer = build_transformer("5b", torch.bfloat16, lora_rank=4)
    layer = transformer.transformer_blocks[0].attn1.to_q
    tokens = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer(tokens) + (tokens @ down.bfloat16().T) @ up.bfloat16().T * layer.scaling["default"]
    assert down.dtype == torch.float32
    assert torch.equal(linear(layer, tokens), expected)


@pytest.mark.parametrize("variant", ["2b", "5b", "1.5-5b-i2v"])
def test_a_clip_does_not_see_its_neighbours(variant: str) -> None:
    conventions = conventions_of(variant)
    transformer = build_transformer(variant, torch.float64)
    clips = make_clips(conventions, torch.float64)
    with torch.no_grad():
        velocities = predict(transformer, clips, conventions)
        backwards = predict(transformer, clips[::-1], conventions)[::-1]
        changed = predict(transformer, [clips[0], make_clip(conventions, (2, 8, 8), 9, torch.float64)], conventions)
    assert all(difference(ours, theirs) < 1e-12 for ours, theirs in zip(velocities, backwards, strict=True))
    assert difference(changed[0], velocities[0]) < 1e-12


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_happens_on_the_device_of_the_clips(variant: str) -> None:
    conventions = conventions_of(variant)
    transformer = build_transformer(variant, torch.bfloat16, lora_rank=4).to("meta")
    clips = [
        ModelInput(clip.latents.to("meta"), clip.prompt_embeds.to("meta"), clip.timestep.to("meta"))
        for clip in make_clips(conventions, torch.bfloat16)
    ]
    velocities = predict(transformer, clips, conventions, RECOMPUTING)
    assert all(velocity.device.type == "meta" for velocity in velocities)
    assert [velocity.shape[0] for velocity in velocities] == [clip.latents.shape[0] for clip in clips]


@pytest.mark.parametrize("forward", [predict, predict_reference])
@pytest.mark.parametrize("variant", ["2b", "5b", "1.5-5b-i2v"])
def test_evaluation_in_inference_mode_leaves_training_possible(
    variant: str, forward: Callable[..., list[Tensor]]
) -> None:
    conventions = conventions_of(variant)
    transformer = build_transformer(variant, lora_rank=4)
    clips = make_clips(conventions, torch.float32, 2)
    image_rotary_emb.cache_clear()
    with torch.inference_mode():
        expected = forward(transformer, clips, conventions)
    velocities, _, gradients = run(transformer, lambda: forward(transformer, clips, conventions))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(velocities, expected, strict=True))
    assert all(gradient.any() for gradient in gradients.values())

"""Our forward over packs against diffusers' own forward with peft's own layers, one clip at a time."""

import pytest
import torch
from torch import Tensor

from bench.reference import predict_reference
from tests.tiny import VARIANTS, add_lora, build_transformer
from tests.train.transformer.parity import (
    EVERY_LINEAR,
    TOLERANCE,
    assert_like_diffusers,
    conventions_of,
    difference,
    make_clip,
    make_clips,
    run,
)
from train.data.example import ModelInput
from train.transformer.forward import predict
from train.transformer.positions import image_rotary_emb


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_pack_of_mixed_clips_equals_diffusers_one_by_one(variant: str, dtype: torch.dtype) -> None:
    conventions = conventions_of(variant)
    transformer = build_transformer(variant, dtype, lora_rank=4)
    assert_like_diffusers(transformer, conventions, make_clips(conventions, dtype))


def test_learned_table_is_never_swapped_for_another_frame_count() -> None:
    conventions = conventions_of("5b-i2v")
    transformer = build_transformer("5b-i2v")
    clip = make_clip(conventions, (2, 8, 12), 0, torch.float32)
    predict_reference(transformer, [clip], conventions)  # diffusers puts sincos positions in its place without a word
    with pytest.raises(AssertionError, match="learned table"):
        predict(transformer, [clip], conventions)


@pytest.mark.parametrize("variant", ["2b", "1.5-5b-i2v"])
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


def test_bf16_pack_keeps_no_fp32_copy_of_its_activations() -> None:
    conventions = conventions_of("1.5-5b")
    transformer = build_transformer("1.5-5b", torch.bfloat16, lora_rank=4)
    clips = make_clips(conventions, torch.bfloat16)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        predict(transformer, clips, conventions)
    tokens = max(len(tensor) for tensor in kept if tensor.ndim == 2)
    rows = tokens * transformer.patch_embed.embed_dim
    assert any(tensor.numel() >= rows for tensor in kept)
    assert all(tensor.dtype == torch.bfloat16 for tensor in kept if tensor.numel() >= rows)


def test_dora_on_every_linear_layer_runs_in_bf16() -> None:
    conventions = conventions_of("1.5-5b-i2v")
    transformer = build_transformer("1.5-5b-i2v", torch.bfloat16)
    add_lora(transformer, 4, target_modules=EVERY_LINEAR, use_dora=True)
    clips = make_clips(conventions, torch.bfloat16, 2)
    velocities, _, gradients = run(transformer, lambda: predict(transformer, clips, conventions))
    assert all(velocity.dtype == torch.bfloat16 and velocity.isfinite().all() for velocity in velocities)
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("variant", ["2b", "5b"])
def test_evaluation_in_inference_mode_leaves_training_possible(variant: str) -> None:
    conventions = conventions_of(variant)
    transformer = build_transformer(variant, lora_rank=4)
    clips = make_clips(conventions, torch.float32, 2)
    image_rotary_emb.cache_clear()
    with torch.inference_mode():
        expected = predict(transformer, clips, conventions)
    velocities, _, gradients = run(transformer, lambda: predict(transformer, clips, conventions))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(velocities, expected, strict=True))
    assert all(gradient.any() for gradient in gradients.values())

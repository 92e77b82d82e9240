"""Conventions are read from configs; contradicting configs are refused in one line."""

import inspect
import re
from typing import Any

import pytest
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
)

from shared.errors import UsageError
from shared.model.conventions import (
    ComponentConfig,
    Conventions,
    SchedulerKeys,
    TransformerKeys,
    VaeKeys,
    read_conventions,
    refusal,
)
from shared.model.geometry import Bucket

ROPE = {"use_rotary_positional_embeddings": True}
V1_5 = ROPE | {"patch_size_t": 2, "patch_bias": False, "sample_height": 300, "sample_width": 300, "sample_frames": 81}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "2b": {"num_attention_heads": 30},
    "5b": ROPE,
    "5b-i2v": ROPE | {"in_channels": 32, "use_learned_positional_embeddings": True},
    "1.5-5b": V1_5,
    "1.5-5b-i2v": V1_5 | {"in_channels": 32, "ofs_embed_dim": 512},
}
"""The five published transformer configs, without keys at their defaults."""


def configs(variant: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    small, newer = variant == "2b", variant.startswith("1.5")
    vae = {"scaling_factor": 1.15258426 if small else 0.7, "invert_scale_latents": newer}
    scheduler = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "snr_shift_scale": 3.0 if small else 1.0,
    }
    return TRANSFORMERS[variant], vae, scheduler


def conventions_of(variant: str) -> Conventions:
    return read_conventions(*configs(variant))


NAMES = {
    "2b": "CogVideoX 1.0 T2V, sincos positions",
    "5b": "CogVideoX 1.0 T2V, RoPE positions",
    "5b-i2v": "CogVideoX 1.0 I2V, RoPE + learned positions",
    "1.5-5b": "CogVideoX 1.5 T2V, sliced RoPE positions",
    "1.5-5b-i2v": "CogVideoX 1.5 I2V, sliced RoPE positions",
}
EXPECTED: dict[str, tuple[object, ...]] = {
    "positions": ("sincos", "rope_crop", "rope_crop_learned", "rope_slice", "rope_slice"),
    "image_to_video": (False, False, True, False, True),
    "in_channels": (16, 16, 32, 16, 32),
    "patch_size_t": (None, None, None, 2, 2),
    "ofs": (None, None, None, None, 2.0),
    "scaling_factor": (1.15258426, 0.7, 0.7, 0.7, 0.7),
    "image_scaling_factor": (1.15258426, 0.7, 0.7, 1 / 0.7, 1 / 0.7),
    "snr_shift_scale": (3.0, 1.0, 1.0, 1.0, 1.0),
    "text_length_fixed": (True, False, True, False, False),
}


def test_each_published_config_gives_its_conventions() -> None:
    for number, (variant, name) in enumerate(NAMES.items()):
        conventions = conventions_of(variant)
        assert conventions.name == name
        for field, values in EXPECTED.items():
            assert getattr(conventions, field) == values[number], (variant, field)
        assert (conventions.text_length, conventions.out_channels, conventions.zero_terminal_snr) == (226, 16, True)


@pytest.mark.parametrize(
    ("keys", "classes"),
    [
        (TransformerKeys, [CogVideoXTransformer3DModel]),
        (VaeKeys, [AutoencoderKLCogVideoX]),
        (SchedulerKeys, [CogVideoXDDIMScheduler, CogVideoXDPMScheduler]),
    ],
)
def test_a_key_left_out_means_what_diffusers_means(keys: type[ComponentConfig], classes: list[type]) -> None:
    for kind in classes:
        parameters = inspect.signature(kind).parameters
        assert keys().model_dump() == {name: parameters[name].default for name in keys.model_fields}


@pytest.mark.parametrize(
    ("variant", "part", "change", "message"),
    [
        ("5b", 0, {"in_channels": 24}, "in_channels: expected 16 or .* 32, got 24"),
        ("5b", 1, {"latent_channels": 8}, "out_channels: expected the VAE's 8, got 16"),
        ("5b", 0, {"out_channels": 32}, "out_channels: .* got 32"),
        ("5b", 0, {"ofs_embed_dim": 512}, "ofs_embed_dim: needs an image condition"),
        ("5b", 0, {"temporal_compression_ratio": 8}, "temporal_compression_ratio: expected the VAE's 4, got 8"),
        ("5b", 1, {"block_out_channels": [8, 8, 8]}, r"expected compression 4x8x8, got \(4, 4\)"),
        ("5b", 0, {"sample_height": 61}, "61x90 must be multiples of patch_size 2"),
        ("2b", 0, {"use_learned_positional_embeddings": True}, "embeddings = True .* do not go together"),
        ("2b", 0, {"patch_size_t": 2}, "patch_size_t = 2 do not go together"),
        ("5b", 2, {"prediction_type": "epsilon"}, "expected 'v_prediction', got 'epsilon'"),
        ("5b", 1, {"scaling_factor": 0.0}, "scaling_factor: expected .* got 0.0"),
        ("5b", 0, {"in_channels": "16"}, "in_channels: expected .* got '16'"),
    ],
)
def test_contradicting_configs_are_refused(variant: str, part: int, change: dict[str, Any], message: str) -> None:
    parts = list(configs(variant))
    parts[part] = parts[part] | change
    with pytest.raises(UsageError, match=message) as caught:
        read_conventions(*parts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variant", "bucket", "message"),
    [
        ("2b", "49x480x720", None),
        ("5b", "13x768x1360", None),
        ("5b", "16x480x720", r"frames must be 4k\+1"),
        ("5b", "49x480x728", "multiples of 16"),
        ("5b-i2v", "49x480x720", None),
        ("5b-i2v", "33x480x720", "learned position table .* covers only 49x480x720; use that bucket"),
        ("1.5-5b", "81x768x1360", None),
        ("1.5-5b", "81x2400x2400", None),
        ("1.5-5b", "81x768x2416", "grid of this checkpoint ends at 2400x2400"),
    ],
)
def test_buckets_that_cannot_be_trained_are_refused_with_the_reason(
    variant: str, bucket: str, message: str | None
) -> None:
    reason = refusal(conventions_of(variant), Bucket(*map(int, bucket.split("x"))))
    if message is None:
        assert reason is None
    else:
        assert reason is not None
        assert reason.startswith(bucket)
        assert re.search(message, reason)


def test_an_older_1_5_checkpoint_has_a_smaller_grid() -> None:
    transformer, vae, scheduler = configs("1.5-5b")
    conventions = read_conventions(transformer | {"sample_height": 96, "sample_width": 170}, vae, scheduler)
    assert refusal(conventions, Bucket(81, 768, 1360)) is None
    assert refusal(conventions, Bucket(81, 1360, 768)) is not None

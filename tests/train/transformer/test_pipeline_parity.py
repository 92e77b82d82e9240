"""What diffusers' own pipelines feed the transformer, captured as they run, against what training builds."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shared.model.conventions import Conventions, read_conventions, refusal
from shared.model.geometry import Bucket, latent_shape, padding_frames
from tests.tiny import (
    TEXT_LENGTH,
    VARIANTS,
    build_pipeline,
    transformer_config,
)
from train.data.example import ModelInput, image_condition, pad_front
from train.transformer.forward import predict
from train.transformer.positions import crop_region, image_rotary_emb

PROMPT = "a grey rabbit yawns in the meadow"
BUCKETS = [Bucket(9, 64, 96), Bucket(13, 64, 64), Bucket(17, 96, 64), Bucket(1, 64, 128)]
"""Odd and even latent frames, the grid's own aspect ratio and others."""


@dataclass
class Captured:
    """Everything that one run of a pipeline handed to its parts."""

    calls: list[dict[str, Any]]
    outputs: list[Tensor]
    decoded: list[Tensor]


@contextmanager
def capture(pipeline: CogVideoXPipeline | CogVideoXImageToVideoPipeline) -> Iterator[Captured]:
    captured = Captured([], [], [])
    transform, decode = pipeline.transformer.forward, pipeline.vae.decode

    def watched_forward(**inputs: Any) -> Any:
        captured.calls.append({name: v.clone() if isinstance(v, Tensor) else v for name, v in inputs.items()})
        result = transform(**inputs)
        captured.outputs.append(result[0].clone())
        return result

    def watched_decode(latents: Tensor) -> Any:
        captured.decoded.append(latents.clone())
        return decode(latents)

    pipeline.transformer.forward, pipeline.vae.decode = watched_forward, watched_decode
    try:
        yield captured
    finally:
        del pipeline.transformer.forward, pipeline.vae.decode


def conventions_of(pipeline: CogVideoXPipeline | CogVideoXImageToVideoPipeline) -> Conventions:
    return read_conventions(pipeline.transformer.config, pipeline.vae.config, pipeline.scheduler.config)


def run(variant: str, bucket: Bucket, output_type: str = "latent") -> tuple[Any, Captured, Tensor, Tensor, Tensor]:
    """Run a tiny pipeline; return the pipeline, what it passed on, its result, the noise and the image."""
    pipeline = build_pipeline(variant)
    frames = latent_shape(bucket)[1]
    frames += padding_frames(frames, pipeline.transformer.config.patch_size_t)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, frames, 16, bucket.height // 8, bucket.width // 8, generator=generator)
    image = torch.rand(1, 3, bucket.height, bucket.width, generator=generator)
    extra = {"image": image} if isinstance(pipeline, CogVideoXImageToVideoPipeline) else {}
    with capture(pipeline) as captured:
        result = pipeline(
            prompt=PROMPT,
            num_frames=bucket.frames,
            height=bucket.height,
            width=bucket.width,
            num_inference_steps=2,
            guidance_scale=1.0,
            latents=noise,
            output_type=output_type,
            max_sequence_length=TEXT_LENGTH,
            generator=torch.Generator().manual_seed(2),
            **extra,
        ).frames
    return pipeline, captured, result, noise, image


def cases() -> list[tuple[str, Bucket]]:
    """Return every variant at two sizes, which together are all of `BUCKETS`; a learned table allows one."""
    return [
        (variant, bucket)
        for number, variant in enumerate(VARIANTS)
        for bucket in (BUCKETS[:1] if variant == "5b-i2v" else (BUCKETS[number % 2], BUCKETS[2 + number % 2]))
    ]


@pytest.mark.parametrize(("variant", "bucket"), cases(), ids=str)
def test_training_inputs_and_prediction_equal_the_pipelines(variant: str, bucket: Bucket) -> None:
    pipeline, captured, _, noise, image = run(variant, bucket)
    conventions = conventions_of(pipeline)
    assert refusal(conventions, bucket) is None
    assert len(captured.calls) == 2
    clip = torch.zeros(latent_shape(bucket)).transpose(0, 1)  # [F,C,H,W]
    padded = pad_front(clip, conventions)

    for call, expected in zip(captured.calls, captured.outputs, strict=True):
        hidden_states, prompt_embeds, timestep = call["hidden_states"], call["encoder_hidden_states"], call["timestep"]
        frames, channels, height, width = hidden_states.shape[1:]
        assert (frames, height, width) == (padded.shape[0], *padded.shape[2:])
        assert channels == conventions.in_channels
        assert prompt_embeds.shape == (1, conventions.text_length, conventions.text_embed_dim)
        assert timestep.dtype == torch.int64 and timestep.shape == (1,)

        ours = image_rotary_emb(conventions, frames, height, width, noise.device)
        if call["image_rotary_emb"] is None:
            assert ours is None
        else:
            assert ours is not None
            assert all(map(torch.equal, ours, call["image_rotary_emb"]))

        if call.get("ofs") is None:
            assert conventions.ofs is None
        else:
            assert torch.equal(call["ofs"], torch.tensor([conventions.ofs]))

        if conventions.image_to_video:
            pixels = pipeline.video_processor.preprocess(image, height=bucket.height, width=bucket.width)
            posterior = pipeline.vae.encode(pixels.unsqueeze(2)).latent_dist
            image_latents = posterior.sample(torch.Generator().manual_seed(2))  # [1,C,1,H,W]
            condition = image_condition(image_latents[0].transpose(0, 1), clip.shape[0], conventions)
            torch.testing.assert_close(condition, hidden_states[0, :, 16:], rtol=1e-6, atol=1e-7)
            assert condition[0].any() and not condition[1:].any()
        else:
            assert channels == 16

        (velocity,) = predict(
            pipeline.transformer, [ModelInput(hidden_states[0], prompt_embeds[0], timestep[0])], conventions
        )
        torch.testing.assert_close(velocity, expected[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(captured.calls[0]["hidden_states"][:, :, :16], noise)


@pytest.mark.parametrize("variant", ["5b", "1.5-5b"])
def test_padding_stands_where_the_pipeline_cuts_it_off(variant: str) -> None:
    bucket = BUCKETS[0]  # three latent frames
    pipeline, captured, _, noise, _ = run(variant, bucket, output_type="pt")
    conventions = conventions_of(pipeline)
    kept = captured.decoded[0].transpose(1, 2)[0]  # [F,C,H,W] that the VAE decodes
    clip = torch.randn(kept.shape, generator=torch.Generator().manual_seed(3))
    padded = pad_front(clip, conventions)
    assert padded.shape == noise.shape[1:]
    assert torch.equal(padded[-len(kept) :], clip)
    assert all(torch.equal(frame, clip[0]) for frame in padded[: -len(kept)])
    assert len(padded) - len(kept) == (1 if conventions.patch_size_t else 0)

    last = captured.outputs[-1]  # at the last step DDIM and DPM return x0 = sqrt(a) * sample - sqrt(1 - a) * velocity
    step = captured.calls[-1]
    alpha = pipeline.scheduler.alphas_cumprod[step["timestep"]].float()
    x0 = alpha.sqrt() * step["hidden_states"][:, :, :16] - (1 - alpha).sqrt() * last
    torch.testing.assert_close(
        kept, x0[0, len(padded) - len(kept) :] / conventions.scaling_factor, rtol=1e-4, atol=1e-4
    )


@given(rows=st.integers(1, 200), columns=st.integers(1, 200), base=st.sampled_from([(30, 45), (4, 6), (48, 85)]))
def test_crop_region_equals_diffusers(rows: int, columns: int, base: tuple[int, int]) -> None:
    theirs = get_resize_crop_region_for_grid((rows, columns), base[1], base[0])
    assert crop_region((rows, columns), base) == theirs


@pytest.mark.parametrize(
    ("variant", "bucket"),
    [
        ("5b", "49x480x720"),
        ("5b", "17x256x384"),
        ("5b", "1x768x512"),
        ("1.5-5b", "81x768x1360"),
        ("1.5-5b", "9x768x768"),
    ],
)
def test_rotary_tables_of_full_size_clips_equal_the_pipelines(variant: str, bucket: str) -> None:
    shape = Bucket(*map(int, bucket.split("x")))
    transformer = transformer_config(variant) | {"attention_head_dim": 64}
    if variant == "5b":
        transformer |= {"sample_height": 60, "sample_width": 90, "sample_frames": 49}
    pipeline = build_pipeline(variant)
    pipeline.transformer.register_to_config(**transformer)
    conventions = conventions_of(pipeline)
    _, frames, height, width = latent_shape(shape)
    frames += padding_frames(frames, conventions.patch_size_t)
    theirs = pipeline._prepare_rotary_positional_embeddings(shape.height, shape.width, frames, torch.device("cpu"))
    ours = image_rotary_emb(conventions, frames, height, width, torch.device("cpu"))
    assert ours is not None
    assert all(map(torch.equal, ours, theirs))

"""One step's gradients in the precisions of the checkpoints, against the same weights in fp32."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor

from shared.config import Config, Train
from shared.model.conventions import Conventions
from tests.experiments import changed
from tests.tiny import add_lora, build_transformer
from tests.train.transformer.parity import conventions_of, make_clip, make_clips
from train import objective, step
from train.data.example import Example
from train.objective import clip_loss
from train.open_run import open_run
from train.run import Run
from train.step import accumulate_gradients, take_gradients
from train.transformer.engine import Engine
from train.transformer.forward import predict

CLIPS_PER_STEP = 64


@pytest.fixture(scope="module")
def opened(experiment: Config) -> Run:
    return open_run(experiment)


def run_with(
    opened: Run, transformer: CogVideoXTransformer3DModel, conventions: Conventions, global_batch_size: int
) -> Run:
    """Return the run with another transformer and batch, in the plain engine."""
    config = changed(opened.config, train={"global_batch_size": global_batch_size, "max_grad_norm": 1e9})
    return replace(opened, config=config, transformer=transformer, conventions=conventions, engine=Engine())


def gradient(opened: Run, dtype: torch.dtype) -> Tensor:
    """[weights of the adapter] of one 2B-like clip with 1,040 video tokens, one of its global batch of 64."""
    conventions = conventions_of("2b")
    transformer = build_transformer("2b", torch.float16, lora_rank=4)
    for parameter in transformer.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    clip = make_clip(conventions, (5, 32, 26), 0, dtype)
    example = Example(clip, torch.randn(clip.latents.shape, generator=torch.Generator().manual_seed(1)), "clip", "0")
    run = run_with(opened, transformer, conventions, global_batch_size=CLIPS_PER_STEP)
    result = take_gradients(run, [[example]], stopping=False)
    found = torch.cat([value.grad.flatten() for value in transformer.parameters() if value.grad is not None])
    assert result.grad_norm == pytest.approx(float(found.norm()))
    return found


@pytest.fixture(scope="module")
def exact(opened: Run) -> Tensor:
    return gradient(opened, torch.float32)


def test_fp16_keeps_gradients_that_are_below_its_range(
    exact: Tensor, opened: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = gradient(opened, torch.float16)
    assert torch.cosine_similarity(ours, exact, dim=0) > 0.9999
    assert float((ours == 0).float().mean()) < 0.01
    assert float(ours.norm()) == pytest.approx(float(exact.norm()), rel=1e-2), "the scale is taken out again"
    monkeypatch.setattr(step, "loss_scale", lambda *_: 1.0)
    unscaled = gradient(opened, torch.float16)
    assert torch.cosine_similarity(unscaled, exact, dim=0) < 0.99, "so the scale is what keeps them"


def test_a_scale_that_overflows_is_lowered_until_it_does_not(
    exact: Tensor, opened: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(objective, "FP16_LOSS_SCALE", 2.0**28)
    with caplog.at_level(logging.WARNING):
        ours = gradient(opened, torch.float16)
    assert "beyond fp16" in caplog.text
    assert torch.cosine_similarity(ours, exact, dim=0) > 0.9999


def test_packs_add_up_to_the_weighted_mean_over_the_batch(opened: Run) -> None:
    """Cut in one way or another; this rank has three of a batch of four."""
    conventions, transformer = conventions_of("2b"), build_transformer("2b", torch.float64, lora_rank=4)
    clips, weights = make_clips(conventions, torch.float64, 3), (1.0, 0.5, 2.0)
    examples = [
        Example(clip, torch.randn(clip.latents.shape, generator=torch.Generator().manual_seed(1)), "", "", weight)
        for clip, weight in zip(clips, weights, strict=True)
    ]
    predictions = predict(transformer, clips, conventions)
    expected = torch.stack(
        [
            example.weight * clip_loss(prediction, example.target)
            for prediction, example in zip(predictions, examples, strict=True)
        ]
    )
    parameters = [value for value in transformer.parameters() if value.requires_grad]
    gradients = torch.autograd.grad(expected.sum() / 4, parameters)
    run = run_with(opened, transformer, conventions, global_batch_size=4)
    for packs in ([examples], [examples[:1], examples[1:]]):
        transformer.zero_grad()
        result = take_gradients(run, packs, stopping=False)
        assert result.loss == pytest.approx(float(expected.detach().sum()) / 4, rel=1e-12)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-14)


def test_dropout_is_keyed_by_seed_and_draw() -> None:
    conventions, transformer = conventions_of("2b"), build_transformer("2b")
    add_lora(transformer.train(), 4, lora_dropout=0.5)
    clip = make_clip(conventions, (1, 8, 8), 0, torch.float32)

    def loss(draw: str, seed: int) -> float:
        example = Example(clip, torch.zeros_like(clip.latents), "clip", draw)
        train = Train(output_dir=Path("unused"), global_batch_size=1, seed=seed)
        return float(accumulate_gradients(transformer, [[example]], conventions, train, Engine())[0])

    first = loss("0:clip", 1)
    assert len({first, loss("1:clip", 1), loss("0:other", 1), loss("0:clip", 2)}) == 4
    assert loss("0:clip", 1) == first

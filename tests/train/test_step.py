"""One step's gradients in the precisions of the checkpoints, against the same weights in fp32."""

import logging
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from shared.config import Train
from tests.tiny import build_transformer
from tests.train.test_forward import conventions_of, make_clip
from train import step
from train.data import Example
from train.engine import Engine
from train.step import loss_scale, step_gradients

CLIPS_PER_STEP = 64


def gradient(dtype: torch.dtype) -> Tensor:
    """[weights of the adapter] of one 2B-like clip with 1,040 video tokens, one of its global batch of 64."""
    conventions = conventions_of("2b")
    transformer = build_transformer("2b", torch.float16, lora_rank=4)
    for parameter in transformer.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    clip = make_clip(conventions, (5, 32, 26), 0, dtype)
    example = Example(clip, torch.randn(clip.latents.shape, generator=torch.Generator().manual_seed(1)), "clip", "0")
    train = Train(output_dir=Path("unused"), global_batch_size=CLIPS_PER_STEP, max_grad_norm=1e9)
    _, result = step_gradients(
        transformer, [[example]], conventions, train, Engine(), Accelerator(cpu=True), stopping=False
    )
    found = torch.cat([value.grad.flatten() for value in transformer.parameters() if value.grad is not None])
    assert result.grad_norm == pytest.approx(float(found.norm()))
    return found


@pytest.fixture(scope="module")
def exact() -> Tensor:
    return gradient(torch.float32)


def test_fp16_keeps_gradients_that_are_below_its_range(exact: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = gradient(torch.float16)
    assert torch.cosine_similarity(ours, exact, dim=0) > 0.9999
    assert float((ours == 0).float().mean()) < 0.01
    monkeypatch.setattr(step, "loss_scale", lambda *_: 1.0)
    unscaled = gradient(torch.float16)
    assert torch.cosine_similarity(unscaled, exact, dim=0) < 0.99, "so the scale is what keeps them"


def test_a_scale_that_overflows_is_lowered_until_it_does_not(
    exact: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(step, "FP16_LOSS_SCALE", 2.0**40)
    with caplog.at_level(logging.WARNING):
        ours = gradient(torch.float16)
    assert "beyond fp16" in caplog.text
    assert torch.cosine_similarity(ours, exact, dim=0) > 0.9999


def test_only_fp16_is_scaled() -> None:
    assert loss_scale(torch.float32, 3) == loss_scale(torch.bfloat16, 3) == 1
    assert loss_scale(torch.float16, 3) == 4 * step.FP16_LOSS_SCALE

"""On a CUDA device: the same numbers as on the CPU, whatever is streamed and offloaded, and no memory left behind.

Run with `pytest -m gpu`; `make test` leaves these out, and without a GPU they skip with that reason.
"""

from functools import partial

import pytest
import torch

from bench.reference import predict_reference
from tests.tiny import VARIANTS, build_transformer
from tests.train.transformer.parity import LEAN, PLANS, conventions_of, largest_difference, make_clips, run
from train.data.example import ModelInput
from train.transformer.engine import Plan, open_engine
from train.transformer.forward import predict

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def on_gpu(clips: list[ModelInput], dtype: torch.dtype) -> list[ModelInput]:
    return [
        ModelInput(clip.latents.to("cuda", dtype), clip.prompt_embeds.to("cuda", dtype), clip.timestep.to("cuda"))
        for clip in clips
    ]


@pytest.fixture(autouse=True)
def exact_fp32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_plan_on_the_gpu_equals_diffusers_on_the_cpu(variant: str, plan: Plan) -> None:
    conventions = conventions_of(variant)
    clips = make_clips(conventions, torch.float32, 3)
    reference = build_transformer(variant, torch.float32, lora_rank=4, num_layers=3)
    _, expected_loss, expected = run(reference, lambda: predict_reference(reference, clips, conventions))
    transformer = build_transformer(variant, torch.float32, lora_rank=4, num_layers=3)
    engine = open_engine(transformer, plan, torch.device("cuda"))
    for _ in range(3):  # buffers are used again
        _, loss, gradients = run(
            transformer, lambda: predict(transformer, on_gpu(clips, torch.float32), conventions, engine)
        )
        torch.testing.assert_close(loss.cpu(), expected_loss, rtol=1e-4, atol=1e-5)
        assert largest_difference({name: value.cpu() for name, value in gradients.items()}, expected) < 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_streamed_and_offloaded_gradients_equal_resident_ones_in_bf16(variant: str) -> None:
    conventions = conventions_of(variant)
    clips = on_gpu(make_clips(conventions, torch.float32, 3), torch.bfloat16)
    results = []
    for plan in (Plan("attention_output"), LEAN):
        transformer = build_transformer(variant, torch.bfloat16, lora_rank=4, num_layers=3)
        engine = open_engine(transformer, plan, torch.device("cuda"))
        results.append(run(transformer, partial(predict, transformer, clips, conventions, engine)))
    (_, resident_loss, resident), (_, lean_loss, lean) = results
    torch.testing.assert_close(lean_loss, resident_loss, rtol=1e-5, atol=1e-6)
    assert largest_difference(lean, resident) < 1e-2


def test_a_lean_run_leaves_nothing_behind() -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", torch.bfloat16, lora_rank=4, num_layers=4)
    engine = open_engine(transformer, LEAN, torch.device("cuda"))
    clips = on_gpu(make_clips(conventions, torch.float32, 3), torch.bfloat16)
    held = []
    for _ in range(30):
        run(transformer, lambda: predict(transformer, clips, conventions, engine))
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert max(held[5:]) <= held[5] + 2**16, held

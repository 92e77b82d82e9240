"""Compiled row-wise kernels: the same gradients, no graph break, and few versions over mixed packs."""

import pytest
import torch
from torch._dynamo.utils import counters

from tests.tiny import build_transformer
from tests.train.transformer.parity import CPU, assert_close, conventions_of, make_clip, make_clips, run
from train.data.example import ModelInput
from train.transformer.compiled import compiled_kernels
from train.transformer.engine import Activations, Engine
from train.transformer.forward import predict

# dynamo itself reads .grad of the tensors it traces
pytestmark = [
    pytest.mark.faults,  # compiling takes half a minute
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
GRADIENTS, TRACE = "aot_eager", "eager"
"""Differentiated as for inductor but not compiled; traced only, which is where torch decides to compile anew."""


@pytest.mark.parametrize(
    ("variant", "activations"),
    [
        pytest.param("2b", "full", marks=pytest.mark.faults),
        ("1.5-5b-i2v", "attention_output"),
        pytest.param("5b", "block_input", marks=pytest.mark.faults),
    ],
)
def test_compiled_kernels_have_the_gradients_of_eager_ones(variant: str, activations: Activations) -> None:
    conventions = conventions_of(variant)
    transformer = build_transformer(variant, lora_rank=4)
    clips = make_clips(conventions, torch.float32, 3)
    expected = run(transformer, lambda: predict(transformer, clips, conventions))
    engine = Engine(activations, kernels=compiled_kernels(GRADIENTS))
    assert_close(run(transformer, lambda: predict(transformer, clips, conventions, engine)), expected)


def test_the_trial_runs_every_kernel_forward_and_backward() -> None:
    compiled_kernels(GRADIENTS).try_on(CPU, torch.float32)


def test_mixed_packs_compile_few_versions_without_a_graph_break() -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", lora_rank=4)
    engine = Engine("attention_output", kernels=compiled_kernels(TRACE))
    generator = torch.Generator().manual_seed(0)

    def pack() -> list[ModelInput]:
        sizes = [torch.randint(1, 4, (3,), generator=generator).tolist() for _ in range(count())]
        return [
            make_clip(conventions, (frames, 4 * rows, 4 * columns), seed, torch.float32)
            for seed, (frames, rows, columns) in enumerate(sizes)
        ]

    def count() -> int:
        return int(torch.randint(1, 5, (), generator=generator))

    torch.autograd.backward([v.sum() for v in predict(transformer, pack(), conventions, engine)])
    before = counters["stats"]["unique_graphs"]
    assert before > 0
    for _ in range(99):
        torch.autograd.backward([v.sum() for v in predict(transformer, pack(), conventions, engine)])
    assert counters["stats"]["unique_graphs"] - before <= 3
    assert not counters["graph_break"]

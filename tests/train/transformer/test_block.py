"""Every memory plan of the packed engine against diffusers' own forward with peft's own layers."""

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.cpu_memory import Flops
from shared.errors import UsageError
from tests.tiny import VARIANTS, add_lora, build_transformer
from tests.train.transformer.parity import (
    CPU,
    EVERY_LINEAR,
    LEAN,
    PLANS,
    assert_close,
    assert_like_diffusers,
    conventions_of,
    difference,
    expected_results,
    make_clip,
    make_clips,
    run,
)
from train.memory.cost import block_flops
from train.transformer.attention import Backend, attend, choose_backend, works
from train.transformer.engine import Activations, Engine, Plan, open_engine
from train.transformer.forward import predict

LEVELS: tuple[Activations, ...] = get_args(Activations)
EVERYWHERE = ("lean-block_input", "lean", "lean-full")
"""Plans that every variant takes in `make test`; the others rotate there, and all run in `make test-faults`."""


def combinations() -> list[Any]:
    """Return every variant with every plan."""
    cases = []
    for turn, (name, variant) in enumerate(product(PLANS, VARIANTS)):
        often = name in EVERYWHERE or turn % len(VARIANTS) == list(PLANS).index(name) % len(VARIANTS)
        marks = () if often else (pytest.mark.faults,)
        cases.append(pytest.param(variant, PLANS[name], id=f"{variant}-{name}", marks=marks))
    return cases


@pytest.mark.parametrize(("variant", "plan"), combinations())
def test_every_plan_equals_diffusers_in_float64(variant: str, plan: Plan) -> None:
    conventions = conventions_of(variant)
    transformer = build_transformer(variant, torch.float64, lora_rank=4, num_layers=3)
    assert_like_diffusers(transformer, conventions, make_clips(conventions, torch.float64, 3), plan)


@pytest.mark.parametrize(("variant", "activations"), [*zip(("2b", "5b", "1.5-5b-i2v"), LEVELS, strict=True)])
def test_every_level_equals_diffusers_in_float32(variant: str, activations: Activations) -> None:
    conventions = conventions_of(variant)
    transformer = build_transformer(variant, torch.float32, lora_rank=4)
    plan = replace(LEAN, activations=activations)
    assert_like_diffusers(transformer, conventions, make_clips(conventions, torch.float32, 2), plan)


@pytest.mark.parametrize("activations", LEVELS)
def test_adapters_on_every_linear_layer_equal_peft(activations: Activations) -> None:
    conventions = conventions_of("1.5-5b-i2v")
    transformer = build_transformer("1.5-5b-i2v", torch.float64, num_layers=3)
    add_lora(transformer, 4, target_modules=EVERY_LINEAR)
    plan = replace(LEAN, activations=activations)
    assert_like_diffusers(transformer, conventions, make_clips(conventions, torch.float64, 3), plan)


@pytest.mark.parametrize("target", ["ff.net.0.proj", "ff.net.2", "to_v", "norm1.linear", "norm2.linear"])
def test_adapters_on_one_kind_of_layer_equal_peft(target: str) -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", torch.float64)
    add_lora(transformer, 4, target_modules=(target,))
    assert_like_diffusers(transformer, conventions, make_clips(conventions, torch.float64, 2), LEAN)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True, "lora_alpha": 3}], ids=["dora", "rslora"])
def test_other_kinds_of_adapters_equal_peft(options: dict[str, Any]) -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", torch.float64)
    add_lora(transformer, 4, **options)
    assert_like_diffusers(transformer, conventions, make_clips(conventions, torch.float64, 2), LEAN)


@pytest.mark.parametrize(
    ("activations", "use_dora"), [("full", False), ("attention_output", False), ("block_input", True)]
)
def test_dropout_is_drawn_as_in_diffusers_and_repeats(activations: Activations, use_dora: bool) -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", torch.float64)
    add_lora(transformer, 4, lora_dropout=0.4, use_dora=use_dora)
    transformer.train()
    clips = make_clips(conventions, torch.float64, 1)
    torch.manual_seed(5)
    expected = expected_results(transformer, conventions, clips)
    torch.manual_seed(5)
    assert_close(run(transformer, lambda: predict(transformer, clips, conventions, Engine(activations))), expected)
    (velocity,) = predict(transformer, clips, conventions, Engine(activations))
    state = torch.get_rng_state()
    torch.autograd.backward(velocity.sum())
    assert torch.equal(torch.get_rng_state(), state), "a recomputation leaves the generator as it was"


def test_evaluation_keeps_nothing() -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", lora_rank=4, num_layers=3)
    clips = make_clips(conventions, torch.float32, 2)
    with torch.no_grad():
        expected = predict(transformer, clips, conventions)
    engine = open_engine(transformer, LEAN, CPU)
    assert engine.offload is not None
    with torch.inference_mode():
        velocities = predict(transformer, clips, conventions, engine)
    assert all(difference(one, other) < 1e-5 for one, other in zip(velocities, expected, strict=True))
    assert engine.offload.num_blocks == 0
    run(transformer, lambda: predict(transformer, clips, conventions, engine))
    assert engine.offload.num_blocks == 3, "training goes on after an evaluation in inference mode"


def step_flops(activations: Activations, num_layers: int, targets: tuple[str, ...]) -> int:
    """Return the FLOPs of matrix products and attention in one step of a pack of two clips."""
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", num_attention_heads=8, num_layers=num_layers, time_embed_dim=8)
    add_lora(transformer, 1, target_modules=targets)
    clips = [make_clip(conventions, shape, 0, torch.float32) for shape in ((3, 8, 12), (2, 8, 12))]
    with Flops() as counter:
        run(transformer, lambda: predict(transformer, clips, conventions, Engine(activations)))
    return int(counter.total)


@pytest.mark.parametrize("activations", LEVELS)
@pytest.mark.parametrize("target", ["to_q", "ff.net.2"])
def test_a_level_recomputes_what_the_formula_says_and_no_more(activations: Activations, target: str) -> None:
    expected = sum(block_flops(128, tokens, activations) for tokens in (7 + 3 * 4 * 6, 7 + 2 * 4 * 6))
    measured = step_flops(activations, 4, (target,)) - step_flops(activations, 3, (target,))
    assert measured == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["flash", "math"])
def test_attention_stays_inside_each_clip(dtype: torch.dtype, backend: Backend) -> None:
    lengths = [5, 17, 1, 40]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, sum(lengths), 3, 16, generator=generator, dtype=dtype)
    clips = torch.split(inputs, lengths, dim=1)
    expected = [scaled_dot_product_attention(*clip.transpose(1, 2)).transpose(0, 1).flatten(1) for clip in clips]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert difference(attend(inputs[0], inputs[1], inputs[2], lengths, backend), torch.cat(expected)) < tolerance


def test_auto_takes_what_works_and_a_missing_kernel_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert choose_backend("auto", CPU, torch.bfloat16, 4, 16) == "flash"
    assert choose_backend("math", CPU, torch.float32, 4, 16) == "math"
    for missing in ("cudnn", "efficient"):
        with pytest.raises(UsageError, match=f"memory.attention = '{missing}': not available on cpu in float32 with 4"):
            choose_backend(missing, CPU, torch.float32, 4, 16)
    calls: list[Tensor] = []

    def wrong_at_one_length(*inputs: Any) -> Tensor:
        calls.append(attend(*inputs))
        return calls[-1] if len(calls) > 1 else calls[-1].index_fill(0, torch.arange(80, 90), 0.0)

    monkeypatch.setattr("train.transformer.attention.attend", wrong_at_one_length)
    assert choose_backend("auto", CPU, torch.float32, 4, 16) == "math", "a kernel wrong at one length is passed over"
    assert "no fused kernel works on cpu" in caplog.text


def test_hopper_tries_flash_attention_3_first_and_older_cards_never(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr("train.transformer.attention.works", lambda backend, *_: tried.append(backend))
    for capability in ((9, 0), (8, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert choose_backend("auto", torch.device("cuda"), torch.bfloat16, 48, 64) == "math"
    assert tried == ["flash3", "cudnn", "flash", "efficient", "flash", "cudnn", "efficient"]


@pytest.mark.parametrize("source", [None, "", "raise ImportError('built for another torch')"])
def test_a_flash_attention_3_that_is_absent_or_broken_is_passed_over(
    source: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source is not None:
        (tmp_path / "flash_attn_interface.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
    assert not works("flash3", CPU, torch.bfloat16, 4, 16)
    with pytest.raises(UsageError, match="'flash3': not available on cpu"):
        choose_backend("flash3", CPU, torch.bfloat16, 4, 16)

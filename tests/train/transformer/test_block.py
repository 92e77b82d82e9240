"""Every level of the recomputing engine against diffusers' own forward with peft's own layers."""

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch.nn.functional import scaled_dot_product_attention

from shared.errors import UsageError
from shared.model.conventions import Conventions
from tests.tiny import VARIANTS, add_lora, build_transformer
from tests.train.transformer.test_forward import (
    EVERY_LINEAR,
    TOLERANCE,
    conventions_of,
    difference,
    float64_rotary,
    largest_difference,
    make_clips,
    run,
)
from train.transformer import attention
from train.transformer.attention import Backend, attention_backward, attention_forward, choose_backend
from train.transformer.engine import Activations, Engine, Plan, open_engine
from train.transformer.forward import ModelInput, predict, predict_reference

CPU = torch.device("cpu")
LEAN = Plan("attention_output", offload_activations=True, stream_weights=2, modulation_table=True, chunk_tokens=37)
LEVELS = get_args(Activations)
PLANS = {
    "full": Plan("full"),
    "full-table": Plan("full", modulation_table=True),
    "full-chunks": Plan("full", chunk_tokens=29),
    "block_input": Plan("block_input"),
    "block_input-chunks": Plan("block_input", chunk_tokens=29),
    "attention_output": Plan("attention_output"),
    "attention_output-chunks": Plan("attention_output", chunk_tokens=29),
    "offload": replace(LEAN, stream_weights=0, modulation_table=False),
    "stream": replace(LEAN, offload_activations=False, modulation_table=False),
    "table": replace(LEAN, offload_activations=False, stream_weights=0),
    "lean": LEAN,
    "lean-block_input": replace(LEAN, activations="block_input"),
    "lean-full": replace(LEAN, activations="full"),
}


def assert_like_diffusers(
    transformer: CogVideoXTransformer3DModel, conventions: Conventions, clips: list[ModelInput], plan: Plan
) -> Engine:
    dtype = clips[0].latents.dtype
    with float64_rotary(dtype):
        expected, expected_loss, expected_gradients = run(
            transformer, lambda: predict_reference(transformer, clips, conventions)
        )
    engine = open_engine(transformer, plan, CPU)
    for _ in range(2):  # the second time, buffers are used again
        velocities, loss, gradients = run(transformer, lambda: predict(transformer, clips, conventions, engine))
        worst = max(difference(ours, theirs) for ours, theirs in zip(velocities, expected, strict=True))
        assert worst < TOLERANCE[dtype]
        assert difference(loss, expected_loss) < TOLERANCE[dtype]
        assert largest_difference(gradients, expected_gradients) < TOLERANCE[dtype]
    return engine


EVERYWHERE = ("full", "block_input-chunks", "attention_output-chunks", "lean")
"""Plans that every variant takes in `make test`; the others take turns there and all in `make test-faults`."""


def combinations() -> list[Any]:
    """Every variant with every plan."""
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


@pytest.mark.parametrize("activations", LEVELS)
@pytest.mark.parametrize("variant", ["2b", "1.5-5b-i2v"])
def test_every_level_equals_diffusers_in_float32(variant: str, activations: Activations) -> None:
    conventions = conventions_of(variant)
    transformer = build_transformer(variant, torch.float32, lora_rank=4)
    plan = replace(LEAN, activations=activations)
    assert_like_diffusers(transformer, conventions, make_clips(conventions, torch.float32, 2), plan)


@pytest.mark.parametrize("activations", LEVELS)
@pytest.mark.parametrize("variant", [pytest.param("2b", marks=pytest.mark.faults), "1.5-5b-i2v"])
def test_adapters_on_every_linear_layer_equal_peft(variant: str, activations: Activations) -> None:
    conventions = conventions_of(variant)
    transformer = build_transformer(variant, torch.float64)
    add_lora(transformer, 4, target_modules=EVERY_LINEAR)
    plan = replace(LEAN, activations=activations, modulation_table=False)
    assert_like_diffusers(transformer, conventions, make_clips(conventions, torch.float64, 3), plan)


@pytest.mark.parametrize("targets", [("ff.net.0.proj",), ("ff.net.2",), ("to_v",), ("to_out.0",), ("norm1.linear",)])
def test_adapters_on_one_kind_of_layer_equal_peft(targets: tuple[str, ...]) -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", torch.float64)
    add_lora(transformer, 4, target_modules=targets)
    plan = replace(LEAN, modulation_table=False)
    assert_like_diffusers(transformer, conventions, make_clips(conventions, torch.float64, 2), plan)


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}, {"lora_alpha": 3}],
    ids=["dora", "rslora", "lora_bias", "alpha"],
)
@pytest.mark.parametrize(
    "activations", [pytest.param("block_input", marks=pytest.mark.faults), "attention_output", "full"]
)
def test_other_kinds_of_adapters_equal_peft(activations: Activations, options: dict[str, object]) -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", torch.float64)
    add_lora(transformer, 4, **options)
    plan = replace(LEAN, activations=activations)
    assert_like_diffusers(transformer, conventions, make_clips(conventions, torch.float64, 2), plan)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_two_adapters_add_up_as_in_peft() -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", torch.float64)
    add_lora(transformer, 4, adapter_name="first")
    add_lora(transformer, 2, seed=5, adapter_name="second")
    transformer.set_adapter(["first", "second"])
    assert_like_diffusers(transformer, conventions, make_clips(conventions, torch.float64, 2), LEAN)


@pytest.mark.parametrize("activations", LEVELS)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_dropout_in_one_chunk_falls_as_in_diffusers(activations: Activations, options: dict[str, object]) -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", torch.float64)
    add_lora(transformer, 4, lora_dropout=0.4, **options)
    transformer.train()
    clips = make_clips(conventions, torch.float64, 1)
    torch.manual_seed(5)
    with float64_rotary(torch.float64):
        _, expected_loss, expected = run(transformer, lambda: predict_reference(transformer, clips, conventions))
    torch.manual_seed(5)
    _, loss, gradients = run(transformer, lambda: predict(transformer, clips, conventions, Engine(activations)))
    assert difference(loss, expected_loss) < 1e-10
    assert largest_difference(gradients, expected) < 1e-10


@pytest.mark.parametrize("activations", LEVELS)
def test_dropout_in_chunks_falls_in_the_backward_pass_as_in_the_forward_pass(activations: Activations) -> None:
    """A numerical derivative along a fixed direction, with the same draw of dropout at both ends."""
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", torch.float64)
    add_lora(transformer, 4, lora_dropout=0.4)
    transformer.train()
    clips = make_clips(conventions, torch.float64, 2)
    engine = Engine(activations, chunk_tokens=29)
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(value.shape, generator=generator, dtype=value.dtype) for value in trained]

    def loss() -> torch.Tensor:
        torch.manual_seed(11)
        return torch.stack([value.square().mean() for value in predict(transformer, clips, conventions, engine)]).sum()

    loss().backward()
    slope = sum(float((value.grad * way).sum()) for value, way in zip(trained, direction, strict=True))
    step, ends = 1e-6, []
    for sign in (1, -2):
        for value, way in zip(trained, direction, strict=True):
            value.data += sign * step * way
        with torch.no_grad():
            ends.append(float(loss()))
    assert abs((ends[0] - ends[1]) / (2 * step) / slope - 1) < 1e-6


def test_the_generator_goes_on_after_the_backward_pass_as_if_there_had_been_none() -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b")
    add_lora(transformer, 4, lora_dropout=0.4)
    transformer.train()
    clips = make_clips(conventions, torch.float32, 1)
    torch.manual_seed(1)
    (velocity,) = predict(transformer, clips, conventions, Engine("block_input"))
    state = torch.get_rng_state()
    velocity.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_attention_by_halves_equals_autograd(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [5, 17, 1, 40]
    generator = torch.Generator().manual_seed(0)
    shape = (sum(lengths), 3, 16)
    query, key, value, gradient = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(4))
    leaves = [part.clone().requires_grad_() for part in (query, key, value)]
    clips = zip(*(torch.split(leaf, lengths) for leaf in leaves), strict=True)
    expected = torch.cat([plain_attention(*clip) for clip in clips])
    expected_gradients = torch.autograd.grad(expected, leaves, gradient.flatten(1))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for backend in ("flash", "math"):
        monkeypatch.setattr("train.transformer.attention.attention_backend", lambda *_, backend=backend: backend)
        attended, states = attention_forward(query, key, value, lengths)
        ours = attention_backward(gradient.flatten(1), query, key, value, attended, states, lengths)
        assert difference(attended, expected.detach()) < tolerance
        assert max(difference(a, b) for a, b in zip(ours, expected_gradients, strict=True)) < tolerance


def plain_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[S,heads,head_dim] three times -> [S,heads*head_dim] by torch's own attention."""
    heads = scaled_dot_product_attention(*(part.transpose(0, 1) for part in (query, key, value)))
    return heads.transpose(0, 1).flatten(1)


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
    assert all(difference(ours, theirs) < 1e-5 for ours, theirs in zip(velocities, expected, strict=True))
    assert engine.offload.num_sent == 0
    run(transformer, lambda: predict(transformer, clips, conventions, engine))
    assert engine.offload.num_sent == 3


@pytest.mark.parametrize("backend", ["flash", "math"])
@pytest.mark.parametrize("activations", LEVELS)
def test_pinned_kernels_give_the_same_gradients(activations: Activations, backend: Backend) -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", torch.float64, lora_rank=4)
    plan = Plan(activations, attention=backend)
    engine = assert_like_diffusers(transformer, conventions, make_clips(conventions, torch.float64, 2), plan)
    assert engine.attention == backend


def test_the_kernel_asked_for_is_the_one_that_runs() -> None:
    states = attention_forward(*torch.randn(3, 20, 2, 16), [12, 8], "math")[1]
    assert [state.backend for state in states] == ["math", "math"]
    states = attention_forward(*torch.randn(3, 20, 2, 16), [12, 8], "flash")[1]
    assert [state.backend for state in states] == ["flash_cpu", "flash_cpu"]


def test_auto_takes_what_works_and_a_missing_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("auto", CPU, torch.bfloat16, 4, 16) == "flash"
    assert choose_backend("math", CPU, torch.float32, 4, 16) == "math"
    for missing in ("cudnn", "efficient"):
        with pytest.raises(UsageError, match=f"memory.attention = '{missing}': not available on cpu in float32 with 4"):
            choose_backend(missing, CPU, torch.float32, 4, 16)
    right = attention.attention_backward

    def wrong(*arguments: Any) -> Any:
        query, key, value = right(*arguments)
        flash = arguments[5][0].backend != "math"
        return (query, value, key) if flash else (query, key, value)

    monkeypatch.setattr(attention, "attention_backward", wrong)
    assert choose_backend("auto", CPU, torch.float32, 4, 16) == "math", "a kernel that errs is passed over"


def test_hopper_tries_flash_attention_3_first_and_older_cards_never(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(attention, "_works", lambda backend, *_: tried.append(backend) or backend == "math")
    for capability in ((9, 0), (8, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert choose_backend("auto", torch.device("cuda"), torch.bfloat16, 48, 64) == "math"
    assert tried == ["flash3", "cudnn", "flash", "efficient", "math", "flash", "cudnn", "efficient", "math"]


@pytest.mark.parametrize("source", [None, "", "raise ImportError('built for another torch')"])
def test_a_flash_attention_3_that_is_absent_or_broken_is_passed_over(
    source: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source is not None:
        (tmp_path / "flash_attn_interface.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
    assert not attention._works("flash3", CPU, torch.bfloat16, 4, 16)
    with pytest.raises(UsageError, match="'flash3': not available on cpu"):
        choose_backend("flash3", CPU, torch.bfloat16, 4, 16)

"""The base in eight bits: small, close, frozen, and refused where it is not close."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import nn

from shared.errors import UsageError
from shared.model.quantize import QuantizedLinear, Storage
from tests.tiny import add_lora, build_transformer
from tests.train.transformer.parity import CPU, LEAN, conventions_of, largest_difference, make_clip, make_clips, run
from train.data.example import Example
from train.memory.fidelity import adapter_gradient, quantize_base
from train.transformer.engine import Engine, Plan, open_engine
from train.transformer.forward import predict

STORAGES: tuple[Storage, ...] = get_args(Storage)


def plan_for(storage: Storage) -> Plan:
    return Plan("attention_output", base_precision=storage)


def a_layer() -> nn.Linear:
    """With a large row and one of zeros."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    layer.weight.data[3] *= 100
    layer.weight.data[5] = 0
    return layer


def test_int8_is_within_half_a_step_of_its_rows_scale() -> None:
    layer = a_layer()
    stored = QuantizedLinear(layer, "int8")
    error = (stored.dequantized(torch.float32) - layer.weight).abs()
    assert stored.weight.dtype == torch.int8
    assert (error <= 0.5001 * layer.weight.abs().amax(1, keepdim=True) / 127).all()


def test_fp8_keeps_three_mantissa_bits_and_widens_exactly() -> None:
    layer = a_layer()
    stored = QuantizedLinear(layer, "fp8")
    wide = stored.dequantized(torch.float32)
    smallest = 2**-9 * stored.scale
    assert stored.weight.dtype == torch.float8_e4m3fn
    assert ((wide - layer.weight).abs() <= torch.maximum(layer.weight.abs() / 16, smallest / 2)).all()
    assert stored.dequantized(torch.bfloat16).float().equal(wide), "powers of two lose nothing"


@pytest.mark.parametrize("storage", STORAGES)
def test_gradients_are_those_of_the_rounded_weights(storage: Storage) -> None:
    conventions = conventions_of("5b")
    quantized, rounded = (build_transformer("5b", torch.float64, lora_rank=4, num_layers=3) for _ in range(2))
    plan = replace(LEAN, base_precision=storage)
    engine = open_engine(quantized, plan, CPU)
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedLinear):
            rounded.get_submodule(name).weight.data = module.dequantized(torch.float64)
    clips = make_clips(conventions, torch.float64, 2)
    _, _, expected = run(rounded, lambda: predict(rounded, clips, conventions))
    _, _, gradients = run(quantized, lambda: predict(quantized, clips, conventions, engine))
    assert largest_difference(gradients, expected) < 1e-10


@pytest.mark.parametrize("storage", STORAGES)
def test_large_layers_are_stored_small_and_no_wide_copy_is_kept(storage: Storage) -> None:
    conventions = conventions_of("2b")
    transformer = build_transformer("2b", lora_rank=4)
    before = dict(transformer.named_parameters())
    open_engine(transformer, plan_for(storage), CPU)
    small = {name for name, value in transformer.named_parameters() if name.endswith("weight") and value.itemsize == 1}
    adapted = ("to_q.base_layer", "to_k.base_layer", "to_v.base_layer", "to_out.0.base_layer")
    expected = {f"attn1.{layer}" for layer in adapted} | {"ff.net.0.proj", "ff.net.2"}
    assert small == {f"transformer_blocks.{block}.{layer}.weight" for block in range(2) for layer in expected}
    assert all(value is before[name] for name, value in transformer.named_parameters() if name in before.keys() - small)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        predict(transformer, make_clips(conventions, torch.float32, 1), conventions)
    wide = [
        module.dequantized(torch.float32) for module in transformer.modules() if isinstance(module, QuantizedLinear)
    ]
    assert kept and not any(tensor.shape == copy.shape and tensor.equal(copy) for tensor in kept for copy in wide)


def _example(variant: str) -> Example:
    conventions = conventions_of(variant)
    clip = make_clip(conventions, (3, 8, 12), 0, torch.float32)
    generator = torch.Generator().manual_seed(1)
    return Example(clip, torch.randn(clip.latents.shape, generator=generator)[:, : conventions.out_channels], "", "")


@pytest.mark.parametrize("storage", STORAGES)
def test_cosine_is_printed_and_a_close_base_is_accepted(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    transformer = build_transformer("1.5-5b-i2v", lora_rank=4)
    conventions, example = conventions_of("1.5-5b-i2v"), _example("1.5-5b-i2v")
    quantize_base(transformer, plan_for(storage), CPU, conventions, example)
    engine = open_engine(transformer, plan_for(storage), CPU)
    assert engine.activations == "attention_output"
    told = capsys.readouterr().err
    assert f"{storage} base, cosine of the adapter's gradient with the exact one 0.99" in told
    assert adapter_gradient(transformer, engine, conventions, example).isfinite().all()


@pytest.mark.parametrize(("least", "broken", "cosine"), [(0.999999, 1, r"0\.9\d+"), (0.99, torch.inf, "nan")])
def test_a_base_that_strays_is_refused(
    least: float, broken: float, cosine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.memory.fidelity.LEAST_COSINE", least)
    transformer = build_transformer("5b", lora_rank=4)
    transformer.transformer_blocks[0].ff.net[2].weight.data[0, 0] = broken
    with pytest.raises(UsageError, match=rf"'int8': .* cosine {cosine} .* below {least};"):
        quantize_base(transformer, plan_for("int8"), CPU, conventions_of("5b"), _example("5b"))


def test_compared_gradients_are_without_dropout() -> None:
    transformer = build_transformer("5b").train()
    add_lora(transformer, 4, lora_dropout=0.5)
    first, second = (adapter_gradient(transformer, Engine(), conventions_of("5b"), _example("5b")) for _ in range(2))
    assert torch.equal(first, second) and first.any()
    assert transformer.training

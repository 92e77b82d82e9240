"""The base in eight bits: small, close, frozen, and refused where it is not close."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from shared.config import Memory, Train
from shared.errors import UsageError
from shared.model.quantize import QuantizedLinear, Storage
from tests.tiny import add_lora, build_pipeline, build_transformer
from tests.train.transformer.parity import CPU, conventions_of, largest_difference, make_clip, make_clips, run
from train.data.example import Example
from train.export import export_adapter
from train.memory.fidelity import adapter_gradient, quantize_base
from train.transformer.engine import Activations, Engine, Plan, open_engine
from train.transformer.forward import predict
from train.transformer.load import adapter_weights, add_adapter

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


def test_the_config_offers_every_storage() -> None:
    assert set(get_args(Memory.model_fields["base_precision"].annotation)) == {"model", *get_args(Storage)}


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


@pytest.mark.parametrize("activations", ["full", "block_input", "attention_output"])
@pytest.mark.parametrize("storage", STORAGES)
def test_gradients_are_those_of_the_rounded_weights(storage: Storage, activations: Activations) -> None:
    conventions = conventions_of("5b")
    quantized, rounded = (build_transformer("5b", torch.float64, lora_rank=4, num_layers=3) for _ in range(2))
    plan = Plan(activations, base_precision=storage, stream_weights=2, offload_activations=True)
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


@pytest.mark.parametrize("storage", STORAGES)
def test_diffusers_loads_an_adapter_trained_on_a_quantized_base(storage: Storage, tmp_path: Path) -> None:
    """And holds, bit for bit, what the same adapter on the exact base exports."""
    train = Train(output_dir=tmp_path, lora_rank=4, lora_alpha=4)
    files = []
    for name, plan in (("exact", Plan()), ("small", plan_for(storage))):
        transformer = build_transformer("2b")
        add_adapter(transformer, train)
        for tensor in adapter_weights(transformer).values():
            nn.init.normal_(tensor, std=0.1, generator=torch.Generator().manual_seed(tensor.numel()))
        open_engine(transformer, plan, CPU)
        files.append(export_adapter(transformer, train, tmp_path / name, {}))
    exact, small = (load_file(path) for path in files)
    assert exact.keys() == small.keys() and len(small) == 2 * 2 * 4
    assert all(small[name].equal(value) and small[name].dtype == value.dtype for name, value in exact.items())
    pipeline = build_pipeline("2b")
    pipeline.load_lora_weights(str(files[1]), adapter_name="default")
    for name, value in adapter_weights(pipeline.transformer).items():
        assert small[f"transformer.{name}"].equal(value)


def _example(variant: str) -> Example:
    conventions = conventions_of(variant)
    clip = make_clip(conventions, (3, 8, 12), 0, torch.float32)
    generator = torch.Generator().manual_seed(1)
    return Example(clip, torch.randn(clip.latents.shape, generator=generator)[:, : conventions.out_channels], "", "")


@pytest.mark.parametrize("variant", ["2b", "1.5-5b-i2v"])
@pytest.mark.parametrize("storage", STORAGES)
def test_cosine_is_printed_and_a_close_base_is_accepted(
    storage: Storage, variant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    transformer = build_transformer(variant, lora_rank=4)
    conventions, example = conventions_of(variant), _example(variant)
    quantize_base(transformer, plan_for(storage), CPU, conventions, example, allow_low_cosine=False)
    engine = open_engine(transformer, plan_for(storage), CPU)
    assert engine.activations == "attention_output"
    told = capsys.readouterr().err
    assert f"{storage} base, cosine of the adapter's gradient with the exact one 0.99" in told
    assert adapter_gradient(transformer, engine, conventions, example).isfinite().all()


@pytest.mark.parametrize("storage", STORAGES)
def test_a_base_that_strays_is_refused_unless_forced(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.memory.fidelity.LEAST_COSINE", 0.999999)
    example, conventions = _example("5b"), conventions_of("5b")
    for allowed in (False, True):
        arguments = build_transformer("5b", lora_rank=4), plan_for(storage), CPU, conventions, example
        if allowed:
            quantize_base(*arguments, allow_low_cosine=True)
        else:
            with pytest.raises(UsageError, match=rf"'{storage}': .* cosine 0\.9\d+ .* below 0\.999999"):
                quantize_base(*arguments, allow_low_cosine=False)


def test_a_base_whose_gradient_is_no_number_is_refused() -> None:
    transformer = build_transformer("5b", lora_rank=4)
    transformer.transformer_blocks[0].ff.net[2].weight.data[0, 0] = torch.inf
    with pytest.raises(UsageError, match=r"cosine nan .* below 0\.99;"):
        quantize_base(transformer, plan_for("int8"), CPU, conventions_of("5b"), _example("5b"), allow_low_cosine=False)


def test_compared_gradients_are_without_dropout() -> None:
    transformer = build_transformer("5b").train()
    add_lora(transformer, 4, lora_dropout=0.5)
    first, second = (adapter_gradient(transformer, Engine(), conventions_of("5b"), _example("5b")) for _ in range(2))
    assert torch.equal(first, second) and first.any()
    assert transformer.training

"""The base in eight or four bits: small, close, frozen, and refused where it is not close."""

import sys
from importlib.util import find_spec
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
from tests.train.memory.test_choice import config_of
from tests.train.transformer.test_forward import conventions_of, largest_difference, make_clip, make_clips, run
from train.data.dataset import Example
from train.export import export_adapter
from train.memory.choice import choose_plan
from train.memory.fidelity import adapter_gradient, open_quantized_engine
from train.transformer.engine import Engine, Plan, open_engine
from train.transformer.forward import predict
from train.transformer.load import adapter_weights, add_adapter

CPU, META = torch.device("cpu"), torch.device("meta")
NF4 = pytest.param("nf4", marks=pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="no bitsandbytes"))
STORAGES = ("int8", "fp8", NF4)


def plan_for(storage: Storage, activations: str = "attention_output") -> Plan:
    return Plan(activations, base_precision=storage, chunk_tokens=29)


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


def test_fp8_keeps_three_bits_behind_the_first_of_every_weight_and_widens_exactly() -> None:
    layer = a_layer()
    stored = QuantizedLinear(layer, "fp8")
    wide = stored.dequantized(torch.float32)
    smallest = 2**-9 * stored.scale
    assert stored.weight.dtype == torch.float8_e4m3fn
    assert ((wide - layer.weight).abs() <= torch.maximum(layer.weight.abs() / 16, smallest / 2)).all()
    assert stored.dequantized(torch.bfloat16).float().equal(wide), "powers of two lose nothing"


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="no bitsandbytes")
def test_nf4_rounds_to_one_of_sixteen_numbers_times_the_largest_of_64() -> None:
    layer = a_layer()
    stored = QuantizedLinear(layer, "nf4")
    assert stored.weight.nbytes == 48 * 64 // 2 and stored.scale.shape == (48 * 64 // 64,)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        wide = stored.dequantized(dtype)
        assert wide.dtype == dtype and wide.shape == layer.weight.shape
        blocks = layer.weight.abs().amax(1, keepdim=True)  # a row is a block here
        assert ((wide - layer.weight).abs() <= 0.16 * blocks).all(), "half the widest gap between two of the sixteen"
    numbers = (stored.dequantized(torch.float32) / blocks.clamp_min(1e-12)).mul(1e4).round().unique()
    assert len(numbers) == 16


@pytest.mark.parametrize("storage", get_args(Storage))
def test_on_meta_a_layer_is_as_large_as_a_real_one_and_needs_no_extra(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = QuantizedLinear(a_layer().bfloat16(), storage) if storage != "nf4" or find_spec("bitsandbytes") else None
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    simulated = QuantizedLinear(nn.Linear(64, 48, device=META, dtype=torch.bfloat16), storage)
    wide = simulated.dequantized(torch.bfloat16)
    assert (wide.shape, wide.dtype, wide.device) == ((48, 64), torch.bfloat16, META)
    assert simulated(torch.empty(5, 64, dtype=torch.bfloat16, device=META)).shape == (5, 48)
    if real is not None:
        ours, theirs = (
            {name: (value.shape, value.dtype) for name, value in layer.named_parameters()}
            for layer in (simulated, real)
        )
        assert ours == theirs


@pytest.mark.parametrize("activations", ["full", "block_input", "attention_output"])
@pytest.mark.parametrize("storage", STORAGES)
def test_gradients_are_those_of_a_model_with_the_rounded_weights(storage: Storage, activations: str) -> None:
    conventions = conventions_of("5b")
    quantized, rounded = (build_transformer("5b", torch.float64, lora_rank=4, num_layers=3) for _ in range(2))
    plan = Plan(activations, base_precision=storage, stream_weights=2, offload_activations=True, chunk_tokens=29)
    engine = open_engine(quantized, plan, CPU)
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedLinear):
            rounded.get_submodule(name).weight.data = module.dequantized(torch.float64)
    clips = make_clips(conventions, torch.float64, 2)
    _, _, expected = run(rounded, lambda: predict(rounded, clips, conventions))
    _, _, gradients = run(quantized, lambda: predict(quantized, clips, conventions, engine))
    assert largest_difference(gradients, expected) < 1e-10


@pytest.mark.parametrize("storage", STORAGES)
def test_only_the_blocks_large_layers_are_stored_small_and_no_wide_copy_is_kept(storage: Storage) -> None:
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
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        predict(transformer, make_clips(conventions, torch.float32, 1), conventions)
    wide = [
        module.dequantized(torch.float32) for module in transformer.modules() if isinstance(module, QuantizedLinear)
    ]
    assert kept and not any(tensor.shape == copy.shape and tensor.equal(copy) for tensor in kept for copy in wide)


@pytest.mark.parametrize("storage", STORAGES)
def test_the_export_of_an_adapter_on_a_small_base_is_what_diffusers_loads(storage: Storage, tmp_path: Path) -> None:
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
def test_cosine_is_told_and_a_close_base_is_accepted(
    storage: Storage, variant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    transformer = build_transformer(variant, lora_rank=4)
    conventions, example = conventions_of(variant), _example(variant)
    engine = open_quantized_engine(transformer, plan_for(storage), CPU, conventions, example, allow_low_cosine=False)
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
            open_quantized_engine(*arguments, allow_low_cosine=True)
        else:
            with pytest.raises(UsageError, match=rf"'{storage}': .* cosine 0\.9\d+ .* below 0\.999999"):
                open_quantized_engine(*arguments, allow_low_cosine=False)


def test_a_base_whose_gradient_is_no_number_is_refused() -> None:
    transformer = build_transformer("5b", lora_rank=4)
    transformer.transformer_blocks[0].ff.net[2].weight.data[0, 0] = torch.inf
    with pytest.raises(UsageError, match=r"cosine nan .* below 0\.99;"):
        open_quantized_engine(
            transformer, plan_for("int8"), CPU, conventions_of("5b"), _example("5b"), allow_low_cosine=False
        )


def test_the_compared_gradients_are_without_dropout_and_training_goes_on_with_it() -> None:
    transformer = build_transformer("5b").train()
    add_lora(transformer, 4, lora_dropout=0.5)
    first, second = (adapter_gradient(transformer, Engine(), conventions_of("5b"), _example("5b")) for _ in range(2))
    assert torch.equal(first, second) and first.any()
    assert transformer.training


def test_nf4_without_its_extra_is_one_line_before_anything_is_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.errors.find_spec", lambda name: None)
    config = config_of({"base_precision": "nf4"})
    with pytest.raises(UsageError, match=r"'nf4' needs the package bitsandbytes: pip install 'precog\[bitsandbytes\]'"):
        choose_plan(config, build_transformer("5b", lora_rank=4), conventions_of("5b"), [], CPU)

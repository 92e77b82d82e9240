"""The base in eight bits: small, close, frozen, and refused where it is not close."""

import pytest
import torch
from torch import nn

from shared.errors import UsageError
from tests.tiny import build_transformer
from tests.train.test_forward import conventions_of, largest_difference, make_clip, make_clips, run
from train.data import Example
from train.engine import Plan, open_engine
from train.fidelity import open_quantised_engine
from train.forward import predict
from train.model import adapter_weights
from train.quantise import Int8Linear

CPU = torch.device("cpu")
INT8 = Plan("attention_output", base_precision="int8", chunk_tokens=29)


def test_weights_are_within_half_a_step_of_their_rows_scale() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    layer.weight.data[3] *= 100
    layer.weight.data[5] = 0
    stored = Int8Linear(layer)
    error = (stored.dequantised(torch.float32) - layer.weight).abs()
    assert stored.weight.dtype == torch.int8
    assert (error <= 0.5001 * layer.weight.abs().amax(1, keepdim=True) / 127).all()


@pytest.mark.parametrize("activations", ["full", "block_input", "attention_output"])
def test_gradients_are_those_of_a_model_with_the_rounded_weights(activations: str) -> None:
    conventions = conventions_of("5b")
    quantised, rounded = (build_transformer("5b", torch.float64, lora_rank=4) for _ in range(2))
    plan = Plan(activations, base_precision="int8", stream_weights=0 if activations == "full" else 2)
    engine = open_engine(quantised, plan, CPU)
    for name, module in quantised.named_modules():
        if isinstance(module, Int8Linear):
            rounded.get_submodule(name).weight.data = module.dequantised(torch.float64)
    clips = make_clips(conventions, torch.float64, 2)
    _, _, expected = run(rounded, lambda: predict(rounded, clips, conventions))
    _, _, gradients = run(quantised, lambda: predict(quantised, clips, conventions, engine))
    assert largest_difference(gradients, expected) < 1e-10


def test_only_the_blocks_large_layers_are_stored_in_eight_bits_and_no_wide_copy_is_kept() -> None:
    conventions = conventions_of("2b")
    transformer = build_transformer("2b", lora_rank=4)
    exported = adapter_weights(transformer).keys()
    open_engine(transformer, INT8, CPU)
    stored = {name for name, value in transformer.named_parameters() if value.dtype == torch.int8}
    layers = ("to_q.base_layer", "to_k.base_layer", "to_v.base_layer", "to_out.0.base_layer")
    expected = {f"attn1.{layer}" for layer in layers} | {"ff.net.0.proj", "ff.net.2"}
    assert stored == {f"transformer_blocks.{block}.{layer}.weight" for block in range(2) for layer in expected}
    assert adapter_weights(transformer).keys() == exported
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        predict(transformer, make_clips(conventions, torch.float32, 1), conventions)
    wide = [module.dequantised(torch.float32) for module in transformer.modules() if isinstance(module, Int8Linear)]
    assert kept and not any(tensor.shape == copy.shape and tensor.equal(copy) for tensor in kept for copy in wide)


def _example(variant: str) -> Example:
    conventions = conventions_of(variant)
    clip = make_clip(conventions, (3, 8, 12), 0, torch.float32)
    generator = torch.Generator().manual_seed(1)
    return Example(clip, torch.randn(clip.latents.shape, generator=generator)[:, : conventions.out_channels], "", "")


@pytest.mark.parametrize("variant", ["2b", "1.5-5b-i2v"])
def test_cosine_is_told_and_a_close_base_is_accepted(variant: str, capsys: pytest.CaptureFixture[str]) -> None:
    transformer = build_transformer(variant, lora_rank=4)
    engine = open_quantised_engine(
        transformer, INT8, CPU, conventions_of(variant), _example(variant), allow_low_cosine=False
    )
    assert engine.activations == "attention_output"
    assert "cosine of the adapter's gradient with the exact one 0.99" in capsys.readouterr().err


def test_a_base_that_strays_is_refused_unless_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.fidelity.LEAST_COSINE", 0.999999)
    example, conventions = _example("5b"), conventions_of("5b")
    with pytest.raises(UsageError, match=r"cosine 0\.9\d+ .* below 0\.999999"):
        open_quantised_engine(
            build_transformer("5b", lora_rank=4), INT8, CPU, conventions, example, allow_low_cosine=False
        )
    open_quantised_engine(build_transformer("5b", lora_rank=4), INT8, CPU, conventions, example, allow_low_cosine=True)

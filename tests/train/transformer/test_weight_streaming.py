"""Streamed weights: residency, prefetch in both directions, and weights that stay as they are."""

from functools import partial

import pytest
import torch

from shared.model.quantize import QuantizedLinear, Storage
from tests.tiny import build_transformer
from tests.train.transformer.parity import CPU, conventions_of, make_clips, run
from train.transformer.engine import Plan, open_engine, quantize_blocks
from train.transformer.forward import predict
from train.transformer.weight_streaming import WeightStream, buffer_bytes, frozen_weights, views


def test_no_more_blocks_are_resident_than_asked_for() -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", lora_rank=4, num_layers=6)
    clips = make_clips(conventions, torch.float32, 2)
    for num_buffers in (2, 3):
        engine = open_engine(transformer, Plan("attention_output", stream_weights=num_buffers), CPU)
        stream = engine.weights
        assert stream is not None
        seen: list[int] = []

        def look(*_: object, stream: WeightStream = stream, seen: list[int] = seen) -> None:
            seen.append(len(stream.resident))

        hooks = [block.norm2.norm.register_forward_hook(look) for block in transformer.transformer_blocks]
        run(transformer, partial(predict, transformer, clips, conventions, engine))
        assert max(seen) == num_buffers and len(seen) == 6 * 2
        for hook in hooks:
            hook.remove()


def test_a_block_arrives_before_its_turn_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    conventions, transformer = conventions_of("5b"), build_transformer("5b", lora_rank=4, num_layers=4)
    engine = open_engine(transformer, Plan("block_input", stream_weights=2), CPU)
    ready: list[tuple[int, bool]] = []
    bring = WeightStream.bring

    def seen(stream: WeightStream, index: int, next_index: int) -> None:
        ready.append((index, index in stream.resident))
        bring(stream, index, next_index)

    monkeypatch.setattr(WeightStream, "bring", seen)
    run(transformer, lambda: predict(transformer, make_clips(conventions, torch.float32, 1), conventions, engine))
    assert ready == [(0, False), *((index, True) for index in (1, 2, 3, 3, 2, 1, 0))]


def test_weights_of_many_kinds_share_a_buffer() -> None:
    tensors = [torch.randn(3, 5), torch.arange(7, dtype=torch.int8), torch.randn(2, 2).bfloat16(), torch.randn(())]
    buffer = torch.zeros(buffer_bytes(tensors), dtype=torch.uint8)
    places = [place.copy_(tensor) for place, tensor in zip(views(buffer, tensors), tensors, strict=True)]
    assert all(torch.equal(place, tensor) for place, tensor in zip(places, tensors, strict=True))
    assert all((place.data_ptr() - buffer.data_ptr()) % 256 == 0 for place in places)


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_scales_travel_with_the_weights_that_they_widen(storage: Storage) -> None:
    transformer = build_transformer("5b", lora_rank=4)
    quantize_blocks(transformer, storage, CPU)
    for block in transformer.transformer_blocks:
        streamed = set(map(id, frozen_weights(block)))
        layers = [module for module in block.modules() if isinstance(module, QuantizedLinear)]
        assert len(layers) == 6 and not any(list(layer.buffers()) for layer in layers)
        assert all({id(layer.weight), id(layer.scale), id(layer.bias)} <= streamed for layer in layers)

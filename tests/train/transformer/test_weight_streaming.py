"""Weights that come and activations that go: who is where, and that buffers used again never mix things up."""

from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from shared.model.quantize import QuantizedLinear, Storage
from tests.tiny import build_transformer
from tests.train.transformer.test_forward import conventions_of, difference, largest_difference, make_clips, run
from tests.train.transformer.test_quantize import STORAGES
from train.transformer.engine import Plan, open_engine, quantize_blocks
from train.transformer.forward import predict
from train.transformer.weight_streaming import ActivationOffload, WeightStream, frozen_weights, lay_out

CPU = torch.device("cpu")


def test_no_more_blocks_are_resident_than_asked_for_and_a_block_in_use_is_one() -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", lora_rank=4, num_layers=6)
    clips = make_clips(conventions, torch.float32, 2)
    for num_resident in (2, 3):
        engine = open_engine(transformer, Plan("attention_output", stream_weights=num_resident), CPU)
        stream = engine.weights
        assert stream is not None
        seen: list[int] = []

        def look(module: torch.nn.Module, *_: object, stream: WeightStream = stream, seen: list[int] = seen) -> None:
            assert any(_inside(module.weight, buffer) for buffer, _ in stream._resident.values())
            seen.append(stream.num_resident)

        hooks = [
            layer.register_forward_hook(look)
            for block in transformer.transformer_blocks
            for layer in (block.ff.net[2], block.attn1.to_q.base_layer, block.norm2.norm)
        ]
        run(transformer, lambda engine=engine: predict(transformer, clips, conventions, engine))
        assert max(seen) == num_resident and len(seen) >= 6 * 3
        assert len(stream._resident) + len(stream._free) == num_resident
        for hook in hooks:
            hook.remove()


def _inside(tensor: Tensor, buffer: Tensor) -> bool:
    return buffer.data_ptr() <= tensor.data_ptr() < buffer.data_ptr() + buffer.nbytes


def test_a_block_is_on_its_way_before_its_turn_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    conventions, transformer = conventions_of("5b"), build_transformer("5b", lora_rank=4, num_layers=4)
    engine = open_engine(transformer, Plan("block_input", stream_weights=2), CPU)
    ready: list[tuple[int, bool]] = []
    resident = WeightStream.resident

    def seen(stream: WeightStream, index: int, next_index: int) -> AbstractContextManager[None]:
        ready.append((index, index in stream._resident))
        return resident(stream, index, next_index)

    monkeypatch.setattr(WeightStream, "resident", seen)
    run(transformer, lambda: predict(transformer, make_clips(conventions, torch.float32, 1), conventions, engine))
    assert ready == [(0, False), *((index, True) for index in (1, 2, 3, 3, 2, 1, 0))]


def test_frozen_weights_do_not_change_and_adapters_never_move() -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", lora_rank=4, num_layers=4)
    before = {name: value.detach().clone() for name, value in transformer.named_parameters()}
    adapters = {name: value.data_ptr() for name, value in transformer.named_parameters() if value.requires_grad}
    engine = open_engine(transformer, Plan("block_input", stream_weights=2, modulation_table=True), CPU)
    run(transformer, lambda: predict(transformer, make_clips(conventions, torch.float32, 2), conventions, engine))
    assert all(torch.equal(value, before[name]) for name, value in transformer.named_parameters())
    assert adapters == {name: value.data_ptr() for name, value in transformer.named_parameters() if value.requires_grad}


def test_weights_of_many_kinds_share_a_buffer() -> None:
    tensors = [torch.randn(3, 5), torch.arange(7, dtype=torch.int8), torch.randn(2, 2).bfloat16(), torch.randn(())]
    places, num_bytes = lay_out(tensors)
    buffer = torch.zeros(num_bytes, dtype=torch.uint8)
    for tensor, place in zip(tensors, places, strict=True):
        place.view(buffer).copy_(tensor)
    assert all(torch.equal(place.view(buffer), tensor) for tensor, place in zip(tensors, places, strict=True))
    assert all(place.offset % 256 == 0 for place in places)


def test_modulation_layers_and_adapters_are_not_streamed() -> None:
    block = build_transformer("5b", lora_rank=4).transformer_blocks[0]
    names = {id(value): name for name, value in block.named_parameters()}
    streamed = {names[id(value)] for value in frozen_weights(block)}
    assert {"norm1.norm.weight", "attn1.to_q.base_layer.weight", "ff.net.2.bias"} <= streamed
    assert not [name for name in streamed if "lora" in name or "norm1.linear" in name or "norm2.linear" in name]


@pytest.mark.parametrize("storage", STORAGES)
def test_scales_travel_with_the_weights_that_they_widen(storage: Storage) -> None:
    transformer = build_transformer("5b", lora_rank=4)
    quantize_blocks(transformer, storage, CPU)
    for block in transformer.transformer_blocks:
        streamed = set(map(id, frozen_weights(block)))
        layers = [module for module in block.modules() if isinstance(module, QuantizedLinear)]
        assert len(layers) == 6 and not any(list(layer.buffers()) for layer in layers)
        assert all({id(layer.weight), id(layer.scale), id(layer.bias)} <= streamed for layer in layers)


def test_tensors_come_back_as_they_went_and_buffers_are_used_again() -> None:
    offload = ActivationOffload(CPU)
    addresses = set()
    for size in (5, 9, 3, 9):
        sent = [[torch.randn(size, 4), torch.randn(size).bfloat16()] for _ in range(4)]
        saved = [offload.send(tensors) for tensors in sent]
        addresses.update(block.host.data_ptr() for block in saved)
        for tensors, block in zip(sent[::-1], saved[::-1], strict=True):
            returned = offload.take_back(block)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(returned, tensors, strict=True))
    assert len(addresses) <= 8, "four buffers, and four larger ones"
    assert len(offload._free) == 4


def test_what_came_back_stays_when_its_buffer_is_used_again() -> None:
    offload = ActivationOffload(CPU)
    (first,) = offload.take_back(offload.send([torch.ones(8)]))
    again = offload.send([torch.zeros(8)])
    assert torch.equal(first, torch.ones(8))
    assert torch.equal(offload.take_back(again)[0], torch.zeros(8))


def test_what_a_pack_has_taken_back_is_not_fetched_again_for_the_next_pack() -> None:
    offload = ActivationOffload(CPU)
    first = offload.send([torch.ones(8)])
    offload.take_back(first)
    second = offload.send([torch.zeros(8)])
    assert second.previous is first
    offload.take_back(second)
    assert first.device_copy is None


def test_a_small_pack_leaves_the_large_buffers_to_large_ones() -> None:
    offload = ActivationOffload(CPU)
    large, small = torch.randn(4096), torch.randn(64)
    for saved in [offload.send([large]), offload.send([small])]:
        offload.take_back(saved)
    hosts = {buffer.data_ptr() for buffer in offload._free}
    assert {offload.send([tensor]).host.data_ptr() for tensor in (small, large)} == hosts


def test_two_packs_may_be_under_way_before_their_backward_passes() -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", torch.float64, lora_rank=4, num_layers=3)
    packs = [make_clips(conventions, torch.float64, 3), make_clips(conventions, torch.float64, 1)]
    plan = Plan("attention_output", offload_activations=True, stream_weights=2)
    _, expected_loss, expected = run(
        transformer, lambda: [velocity for pack in packs for velocity in predict(transformer, pack, conventions)]
    )
    engine = open_engine(transformer, plan, CPU)
    _, loss, gradients = run(
        transformer,
        lambda: [velocity for pack in packs for velocity in predict(transformer, pack, conventions, engine)],
    )
    assert difference(loss, expected_loss) < 1e-12
    assert largest_difference(gradients, expected) < 1e-10


def test_a_forward_pass_without_a_backward_pass_spoils_nothing() -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", torch.float64, lora_rank=4, num_layers=3)
    clips = make_clips(conventions, torch.float64, 2)
    _, _, expected = run(transformer, lambda: predict(transformer, clips, conventions))
    engine = open_engine(transformer, Plan("attention_output", offload_activations=True, stream_weights=2), CPU)
    predict(transformer, clips, conventions, engine)
    _, _, gradients = run(transformer, lambda: predict(transformer, clips, conventions, engine))
    assert largest_difference(gradients, expected) < 1e-10


def test_a_second_backward_pass_is_refused() -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", lora_rank=4)
    engine = open_engine(transformer, Plan("attention_output", offload_activations=True), CPU)
    (velocity,) = predict(transformer, make_clips(conventions, torch.float32, 1), conventions, engine)
    velocity.sum().backward(retain_graph=True)
    with pytest.raises(AssertionError, match="second backward"):
        velocity.sum().backward()

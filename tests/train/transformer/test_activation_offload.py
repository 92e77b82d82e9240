"""Offloaded activations: what goes out comes back, in step order and out of it."""

import gc

import pytest
import torch

from tests.tiny import build_transformer
from tests.train.transformer.parity import CPU, LEAN, conventions_of, make_clips, run
from train.transformer.activation_offload import ActivationOffload
from train.transformer.engine import Plan, open_engine
from train.transformer.forward import predict


def test_tensors_come_back_with_their_values_and_strides() -> None:
    offload = ActivationOffload(CPU)
    sent = [[torch.randn(5, 4).T, torch.randn(2, 3, 4).transpose(0, 1), torch.randn(7).bfloat16()] for _ in "abc"]
    blocks = [offload.open_block() for _ in sent]
    saved = [[block.send(tensor) for tensor in tensors] for block, tensors in zip(blocks, sent, strict=True)]
    for block, tensors, places in reversed(list(zip(blocks, sent, saved, strict=True))):
        returned = [block.take_back(place) for place in places]
        assert all(torch.equal(one, other) for one, other in zip(returned, tensors, strict=True))
        assert [tensor.stride() for tensor in returned] == [tensor.stride() for tensor in tensors]


def test_the_block_before_is_fetched_while_one_is_used() -> None:
    offload = ActivationOffload(CPU)
    blocks, saved = [], []
    for _ in range(3):
        blocks.append(offload.open_block())
        saved.append(blocks[-1].send(torch.ones(8)))
    assert [place.source is not None for place in saved] == [False, True, True], "two blocks are on their way out"
    blocks[2].take_back(saved[2])
    assert [place.device_copy is not None for place in saved] == [False, True, False]
    assert not any(place.source is not None for place in saved)


def test_steps_leave_no_tensor_behind() -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", lora_rank=4, num_layers=3)
    clips = make_clips(conventions, torch.float32, 2)
    engine = open_engine(transformer, LEAN, CPU)
    counts = []
    gc.collect()
    gc.freeze()  # the libraries' objects are not looked through
    gc.disable()  # what only a collection would free is left behind
    try:
        for _ in range(4):
            run(transformer, lambda: predict(transformer, clips, conventions, engine))
            counts.append(sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects()))
    finally:
        gc.enable()
        gc.unfreeze()
    assert counts[-1] == counts[1]


def test_a_second_backward_pass_is_refused() -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", lora_rank=4)
    engine = open_engine(transformer, Plan("block_input", offload_activations=True), CPU)
    (velocity,) = predict(transformer, make_clips(conventions, torch.float32, 1), conventions, engine)
    torch.autograd.backward(velocity.sum(), retain_graph=True)
    with pytest.raises(AssertionError, match="second backward"):
        torch.autograd.backward(velocity.sum())

"""Modulation from the table against modulation made in its place, bit for bit."""

import pytest
import torch

from tests.tiny import VARIANTS, add_lora, build_transformer
from tests.train.transformer.test_forward import conventions_of, make_clips
from train.transformer.engine import Engine, Plan, open_engine
from train.transformer.forward import embed_timesteps, predict
from train.transformer.modulation import block_rows, is_frozen

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_table_gives_the_very_bits_of_modulation_in_place(variant: str, dtype: torch.dtype) -> None:
    conventions = conventions_of(variant)
    transformer = build_transformer(variant, dtype, lora_rank=4)
    clips = make_clips(conventions, dtype)
    with torch.no_grad():
        expected = predict(transformer, clips, conventions)
        engine = open_engine(transformer, Plan(modulation_table=True), CPU)
        for _ in range(2):  # made, then remembered
            velocities = predict(transformer, clips, conventions, engine)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(velocities, expected, strict=True))


def test_rows_of_a_clip_do_not_depend_on_its_neighbours() -> None:
    conventions = conventions_of("1.5-5b-i2v")
    transformer = build_transformer("1.5-5b-i2v")
    clips = make_clips(conventions, torch.float32)
    block = transformer.transformer_blocks[0]
    with torch.no_grad():
        together = block_rows(block, embed_timesteps(transformer, clips, conventions))[0]
        alone = [block_rows(block, embed_timesteps(transformer, [clip], conventions)[:1])[0] for clip in clips]
    assert together.shape == torch.Size([2 * len(clips), 3, 64])
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)


def test_layers_are_used_once_for_each_timestep() -> None:
    conventions = conventions_of("5b")
    transformer = build_transformer("5b", lora_rank=4)
    engine = open_engine(transformer, Plan(modulation_table=True), CPU)
    calls: list[int] = []
    layer = transformer.transformer_blocks[1].norm2.linear
    layer.register_forward_hook(lambda *_: calls.append(1))
    clips = make_clips(conventions, torch.float32, 3)
    with torch.no_grad():
        for _ in range(4):
            predict(transformer, clips, conventions, engine)
    assert len(calls) == len({int(clip.timestep) for clip in clips}) == 3


def test_adapters_on_what_makes_the_modulation_rule_the_table_out() -> None:
    assert is_frozen(build_transformer("5b", lora_rank=4))
    for target in ("norm1.linear", "norm2.linear", "time_embedding.linear_1", "ofs_embedding.linear_1"):
        transformer = build_transformer("1.5-5b-i2v")
        add_lora(transformer, 4, target_modules=[target])
        assert not is_frozen(transformer)
        with pytest.raises(AssertionError, match="changes with every step"):
            open_engine(transformer, Plan(modulation_table=True), CPU)
    assert Engine().modulation is None

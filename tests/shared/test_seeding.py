"""Draws named by what they are for: the same ones forever, and others for other names."""

import torch

from shared.seeding import digest, generator, integer_seed, normal


def test_a_draw_made_today_is_drawn_forever():
    """Renew never: crops and noised first frames of stored clips, and the noise of a resumed run, come from these."""
    assert generator("crop", "seed").integers(10**9, size=4).tolist() == [372261400, 993013530, 686247882, 921957312]
    assert normal((3,), "image-noise", "key", 0).tolist() == [
        -0.5190707445144653,
        -1.3439103364944458,
        -1.1629337072372437,
    ]
    assert integer_seed("a", 1) == 3550756640580053907


def test_a_draws_name_has_parts_of_a_type_in_an_order():
    names = [("a", 1), ("a", "1"), (1, "a"), ("a1",), ("a", ""), ("a",), ("", "a"), (["a", 1].__repr__(),)]
    assert len({digest(*name) for name in names}) == len(names)


def test_draws_of_one_name_are_equal_and_do_not_depend_on_what_was_drawn_before():
    first = normal((1000,), "noise", 7)
    generator("noise", 8).integers(10)
    torch.manual_seed(0)
    assert torch.equal(normal((1000,), "noise", 7), first) and first.dtype == torch.float32
    assert abs(float(first.mean())) < 0.1 and abs(float(first.std()) - 1) < 0.1

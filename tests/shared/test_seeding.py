"""Random draws: equal for equal names, on every machine."""

import torch

from shared.seeding import digest, generator, integer_seed, normal


def test_draws_never_change() -> None:
    """Never renew these numbers: stored crops and first frames and the noise of resumed runs come from them."""
    assert generator("crop", "seed").integers(10**9, size=4).tolist() == [372261400, 993013530, 686247882, 921957312]
    drawn = normal((3,), "image-noise", "key", 0).tolist()
    assert drawn == [-0.5190707445144653, -1.3439103364944458, -1.1629337072372437]
    assert integer_seed("a", 1) == 3550756640580053907


def test_types_and_order_of_a_name_count() -> None:
    names: list[tuple[str | int, ...]] = [("a", 1), ("a", "1"), (1, "a"), ("a1",), ("a", ""), ("a",), ("", "a")]
    names.append((["a", 1].__repr__(),))
    assert len({digest(*name) for name in names}) == len(names)


def test_draws_do_not_depend_on_earlier_ones() -> None:
    first = normal((1000,), "noise", 7)
    generator("noise", 8).integers(10)
    torch.manual_seed(0)
    assert torch.equal(normal((1000,), "noise", 7), first) and first.dtype == torch.float32
    assert abs(float(first.mean())) < 0.1 and abs(float(first.std()) - 1) < 0.1

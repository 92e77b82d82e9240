"""Cards are known by name or by size; a bare number is a name."""

import pytest

from shared.cards import card_gib
from shared.errors import UsageError


@pytest.mark.parametrize(
    ("text", "gib"),
    [
        ("4090", 24),
        ("RTX 3060", 12),
        ("NVIDIA GeForce RTX 5090", 32),
        ("L40S", 48),
        ("rtx-6000", 48),
        ("h200", 141),
        ("24GiB", 24),
        ("11.5 GB", 11.5),
    ],
)
def test_a_card_is_known_by_name_or_size(text: str, gib: float) -> None:
    assert card_gib(text) == gib


@pytest.mark.parametrize("text", ["24", "5099", "", "GiB"])
def test_a_number_alone_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="not a known card"):
        card_gib(text)

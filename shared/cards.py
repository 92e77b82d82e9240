"""Memory and published rates of common GPUs, by the names that `--card` takes."""

import difflib
import re
from dataclasses import dataclass

from shared.errors import UsageError


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU."""

    name: str
    gib: float
    """Memory that CUDA reports; with ECC less than the data sheet's."""
    tflops: float = 0.0
    """Published dense bf16 rate with fp32 accumulation; 0 where bf16 is missing or only the memory is known."""


CARDS = {
    "3060": Card("RTX 3060", 11.8, 25.5),
    "3070": Card("RTX 3070", 7.8, 40.6),
    "3080": Card("RTX 3080", 9.8, 59.5),
    "3090": Card("RTX 3090", 23.7, 71.0),
    "4060": Card("RTX 4060", 7.8, 30.2),
    "4070": Card("RTX 4070", 11.7, 58.3),
    "4080": Card("RTX 4080", 15.7, 97.5),
    "4090": Card("RTX 4090", 23.6, 165.2),
    "5060": Card("RTX 5060", 7.7, 38.4),
    "5070": Card("RTX 5070", 11.6, 61.7),
    "5080": Card("RTX 5080", 15.5, 112.6),
    "5090": Card("RTX 5090", 31.4, 209.5),
    "t4": Card("T4", 14.6),
    "v100": Card("V100 32 GB", 31.7),
    "l4": Card("L4", 22.0, 121.0),
    "l40": Card("L40", 44.4, 181.0),
    "l40s": Card("L40S", 44.4, 362.0),
    "a10": Card("A10", 22.1, 125.0),
    "a40": Card("A40", 44.4, 149.7),
    "a6000": Card("RTX A6000", 47.4, 154.8),
    "a100": Card("A100 80 GB", 79.2, 312.0),
    "h100": Card("H100 SXM", 79.2, 989.4),
    "h200": Card("H200 SXM", 139.8, 989.4),
    "b200": Card("B200", 178.4, 2250.0),
    "6000": Card("RTX 6000 Ada", 47.4, 364.2),
}
"""Rates: NVIDIA's GA102, Ada and RTX Blackwell whitepapers (x060 by number of SMs and clock), and the data sheets of
the other cards, all without sparsity."""


def find_card(text: str) -> Card:
    """Return a card by its name, such as `4090`, `RTX 4090` or `L40S`, or one with the memory in `24GiB`.

    A bare number is a name, never a memory. Raises `UsageError` with the nearest name.
    """
    key = re.sub(r"nvidia|geforce|rtx|tesla|[\s_-]", "", text.lower())
    if key in CARDS:
        return CARDS[key]
    if (size := re.fullmatch(r"(\d{1,4}(?:\.\d+)?)gi?b", key)) and float(size[1]):
        return Card(f"{float(size[1]):g} GiB", float(size[1]))
    near = difflib.get_close_matches(key, CARDS, 1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(CARDS)};"
    raise UsageError(f"--card {text!r}: unknown card; {hint} write another card's memory as 24GiB")

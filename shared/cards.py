"""Memory of common GPUs by name, for `--card`."""

import re

from shared.errors import UsageError

_NAMES = {
    8: "4060 5060",
    10: "3080",
    12: "3060 4070 5070",
    16: "4080 5080 t4",
    24: "3090 4090 a10 l4",
    32: "5090 v100",
    48: "a40 a6000 l40 l40s rtx6000",
    80: "a100 h100",
    141: "h200",
    180: "b200",
}
CARD_GIB = {name: float(gib) for gib, names in _NAMES.items() for name in names.split()}
"""GiB by name, lower case without spaces; a card of another size is given as its size, such as 40GiB for an A100."""


def card_gib(text: str) -> float:
    """Return the memory in GiB of a card given as `4090`, `RTX 4090`, `L40S` or `24GiB`.

    A bare number is a card's name, never GiB. Raises `UsageError`.
    """
    compact = re.sub(r"[\s_-]", "", text.lower())
    for name in (compact, re.sub(r"^(nvidia)?(geforce)?(rtx|tesla)?", "", compact)):
        if name in CARD_GIB:
            return CARD_GIB[name]
    if size := re.fullmatch(r"(\d{1,4}(?:\.\d+)?)gi?b", compact):
        return float(size[1])
    raise UsageError(f"--card {text!r}: not a known card; expected one of {', '.join(CARD_GIB)}, or a size as in 24GiB")

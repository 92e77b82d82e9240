"""Damage to files, drawn at random."""

import random
from collections.abc import Sequence
from pathlib import Path


def changed(paths: Sequence[Path], draws: random.Random) -> Path:
    """Flip a bit of one of the files, cut it off, add to it, or fill a part with zeros."""
    path = draws.choice(paths)
    content = bytearray(path.read_bytes())
    position, kind = draws.randrange(len(content)), draws.choice(["flip", "flip", "flip", "cut", "add", "zero"])
    if kind == "flip":
        content[position] ^= 1 << draws.randrange(8)
    elif kind == "cut":
        del content[position:]
    elif kind == "add":
        content += draws.randbytes(draws.randrange(1, 600))
    else:
        content[position : position + 600] = bytes(len(content[position : position + 600]))
    path.write_bytes(content)
    return path

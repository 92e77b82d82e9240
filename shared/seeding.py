"""Random draws as pure functions of names, from a counter-based generator (Philox) keyed by a hash of the name.

There is no state: a draw does not depend on rank, worker, device or earlier draws.
"""

import hashlib
import json

import numpy as np
import torch

NamePart = str | int


def digest(*parts: NamePart) -> bytes:
    """Return the 32 bytes that name a draw; types and order of `parts` count."""
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def generator(*parts: NamePart) -> np.random.Generator:
    """Return a fresh generator for the draw named by `parts`, equal on every machine."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest(*parts)[:16], "little")))


def normal(shape: tuple[int, ...], *parts: NamePart) -> torch.Tensor:
    """Draw a standard normal float32 tensor of `shape` on the CPU."""
    return torch.from_numpy(generator(*parts).standard_normal(shape, dtype=np.float32))


def integer_seed(*parts: NamePart) -> int:
    """Return a seed below 2**63 for libraries that need one."""
    return int.from_bytes(digest(*parts)[:8], "little") >> 1

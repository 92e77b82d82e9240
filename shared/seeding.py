"""Random draws as pure functions of names: a counter-based generator (Philox) keyed by a hash of what the draw is for.

Nothing here has state, so a draw does not depend on rank, worker, device or on how many draws came before it.
"""

import hashlib
import json

import numpy as np
import torch

Part = str | int


def digest(*parts: Part) -> bytes:
    """32 bytes that name a draw; parts keep their type and order."""
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def generator(*parts: Part) -> np.random.Generator:
    """A fresh generator for the draw named by `parts`; the same parts give the same numbers on every machine."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest(*parts)[:16], "little")))


def normal(shape: tuple[int, ...], *parts: Part) -> torch.Tensor:
    """Standard normal float32 of `shape` on the CPU."""
    return torch.from_numpy(generator(*parts).standard_normal(shape, dtype=np.float32))


def integer_seed(*parts: Part) -> int:
    """A seed below 2**63 for libraries that want one."""
    return int.from_bytes(digest(*parts)[:8], "little") >> 1

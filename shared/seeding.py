"""Random draws as pure functions of names, from a counter-based generator (Philox) keyed by a hash of the name.

There is no state: a draw does not depend on rank, worker, device or earlier draws.
"""

import hashlib
import json
import math
from threading import Thread

import numpy as np
import numpy.typing as npt
import torch

NamePart = str | int
THREADED_SIZE = 2**16
"""Values above which two threads draw."""
WORDS_PER_VALUE = 1.0245
"""Random words that numpy takes for a normal value: a little more than the mean of 1.0219."""
BLOCK_WORDS = 8


def digest(*parts: NamePart) -> bytes:
    """Return the 32 bytes that name a draw; types and order of `parts` count."""
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def generator(*parts: NamePart) -> np.random.Generator:
    """Return a fresh generator for the draw named by `parts`, equal on every machine."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest(*parts)[:16], "little")))


def normal(shape: tuple[int, ...], *parts: NamePart) -> torch.Tensor:
    """Draw a standard normal float32 tensor of `shape` on the CPU."""
    draw, values = generator(*parts), np.empty(math.prod(shape), np.float32)
    done = _draw_in_two_threads(draw, values, *parts) if values.size > THREADED_SIZE else 0
    draw.standard_normal(out=values[done:], dtype=np.float32)
    return torch.from_numpy(values.reshape(shape))


def _draw_in_two_threads(draw: np.random.Generator, values: npt.NDArray[np.float32], *parts: NamePart) -> int:
    """Fill `values` with the next ones of the fresh generator `draw`; return how many are right from the start.

    A second thread begins at a later word of the same stream. Most values take one word and some take more, so the
    first thread goes on to that word; it rarely steps over it, and then the second thread's values do not count.
    """
    half = values.size // 2
    block = math.ceil(half * WORDS_PER_VALUE / BLOCK_WORDS)
    later = generator(*parts)
    later.bit_generator.advance(block)  # type: ignore[attr-defined]
    rest = np.empty(values.size - half, np.float32)
    thread = Thread(target=later.standard_normal, kwargs={"out": rest, "dtype": np.float32})
    thread.start()
    draw.standard_normal(out=values[:half], dtype=np.float32)
    done = half
    while (gap := block * BLOCK_WORDS - _words_taken(draw)) > 0 and done < values.size:
        count = min(max(1, int(0.9 * gap)), values.size - done)
        draw.standard_normal(out=values[done : done + count], dtype=np.float32)
        done += count
    thread.join()
    if gap:
        return done
    values[done:] = rest[: values.size - done]
    return values.size


def _words_taken(draw: np.random.Generator) -> int:
    """Return the 32-bit words that a generator of Philox has taken since its start."""
    state = draw.bit_generator.state
    return int(8 * state["state"]["counter"][0] - 2 * (4 - state["buffer_pos"]) - state["has_uint32"])


def integer_seed(*parts: NamePart) -> int:
    """Return a seed below 2**63 for libraries that need one."""
    return int.from_bytes(digest(*parts)[:8], "little") >> 1

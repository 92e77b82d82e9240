"""Which clips an optimizer step trains, and how they are cut into packs: pure functions of (view, seed, step).

The rows of the view form an endless stream of epochs. Epoch e is a permutation keyed by (view hash, seed, e), and
optimizer step k (from 0) is positions [k*G, (k+1)*G) of the stream. So each step has G clips, each clip comes once
per epoch, a batch may span the end of an epoch, and a run's position is one integer, on any number of processes.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from shared.errors import DataError
from shared.seeding import generator

Packs = tuple[tuple[int, ...], ...]
"""The packs of one rank, in the order they run; a pack is indices into the global batch, ascending."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One clip of one epoch; `row` counts in the view's canonical order."""

    epoch: int
    row: int


def global_batch(view_hash: str, seed: int, num_rows: int, global_batch_size: int, step: int) -> tuple[Draw, ...]:
    """The clips of optimizer step `step` (from 0), in stream order."""
    assert num_rows > 0, "num_train_steps refuses an empty view"
    assert global_batch_size > 0
    assert step >= 0
    draws: list[Draw] = []
    position, end = step * global_batch_size, (step + 1) * global_batch_size
    while position < end:
        epoch, start = divmod(position, num_rows)
        stop = min(num_rows, start + end - position)
        rows = _epoch_rows(view_hash, seed, num_rows, epoch)[start:stop].tolist()
        draws += [Draw(epoch, row) for row in rows]
        position += stop - start
    return tuple(draws)


def num_train_steps(num_rows: int, global_batch_size: int, max_train_steps: int | None, num_train_epochs: int) -> int:
    """Optimizer steps of the run, the same on every rank: `max_train_steps`, or enough to see each clip in every epoch.

    The last batch is filled from the epoch after. Raises `DataError` for a view without clips.
    """
    if num_rows < 1:
        raise DataError("the view has no training clips; check its table of skipped clips and data.held_out_clips")
    if max_train_steps is not None:
        return max_train_steps
    return -(-num_train_epochs * num_rows // global_batch_size)


def pack_cost(tokens: int, width: int) -> int:
    """Floating-point operations of one block's forward on one clip: 24 d^2 S (linear layers) + 4 S^2 d (attention)."""
    return 24 * width**2 * tokens + 4 * tokens**2 * width


def divide(tokens: Sequence[int], width: int, world_size: int, max_tokens_per_pack: int) -> tuple[Packs, ...]:
    """[rank][pack][index into the batch] for clips of `tokens` each; every index once, ranks may be empty.

    Ranks are balanced by cost, longest processing time first: no rank is above the mean by more than one clip. Within
    a rank the largest clip goes first, each into the fullest pack that still holds it (best fit decreasing). A clip
    above `max_tokens_per_pack` is a pack of its own.
    """
    assert world_size > 0
    assert all(count > 0 for count in tokens)
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]
    for index in sorted(range(len(tokens)), key=lambda index: (-tokens[index], index)):
        load, rank = loads[0]
        ranks[rank].append(index)
        heapq.heapreplace(loads, (load + pack_cost(tokens[index], width), rank))
    return tuple(_best_fit(indices, tokens, max_tokens_per_pack) for indices in ranks)


def _best_fit(descending: Sequence[int], tokens: Sequence[int], max_tokens_per_pack: int) -> Packs:
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), ascending
    for index in descending:
        fullest = bisect_left(room, (tokens[index], 0))
        if fullest < len(room):
            free, pack = room.pop(fullest)
        else:
            free, pack = max_tokens_per_pack, len(packs)
            packs.append([])
        packs[pack].append(index)
        insort(room, (free - tokens[index], pack))
    return tuple(tuple(sorted(pack)) for pack in packs)


@lru_cache(maxsize=2)  # a batch spans the end of an epoch
def _epoch_rows(view_hash: str, seed: int, num_rows: int, epoch: int) -> npt.NDArray[np.int64]:
    """The epoch's permutation, by sorting raw Philox words: `Generator.permutation` may change with numpy's version."""
    words = generator("order", view_hash, seed, epoch).bit_generator.random_raw(num_rows)
    return np.argsort(words, kind="stable")

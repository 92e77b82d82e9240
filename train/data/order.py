"""Clips of an optimizer step and their packs: pure functions of (view, seed, step).

The rows of the view form an endless stream of epochs. A row has one place per epoch, or as many as its `repeats`.
Epoch e is a permutation of the places keyed by (view hash, seed, e), and optimizer step k (from 0) is positions
[k*G, (k+1)*G) of the stream. So each step has G clips, each clip comes once per place and epoch, a batch may span the
end of an epoch, and a run's position is one integer, on any number of processes.

For shards that must be fetched, the permutation reads a few shards at a time: see `Windows`.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from shared.errors import DataError
from shared.fingerprint import key_of
from shared.seeding import generator

Packs = tuple[tuple[int, ...], ...]
"""The packs of one rank, in the order they run; a pack is indices into the global batch, ascending."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One clip of one epoch; `row` counts in the view's canonical order, `repetition` from 0 within the epoch."""

    epoch: int
    row: int
    repetition: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """An order that needs `num_shards` shards at any moment, and each shard for one interval of the epoch.

    A cache of the `2 * num_shards - 1` shards that were read last fetches each shard once per epoch.
    """

    num_shards: int
    shards: npt.NDArray[np.int64]
    """[places] number of the shard that holds the place's clip, from 0 without a gap."""

    @property
    def name(self) -> str:
        """Unique name of the order among those of the same view and seed."""
        layout = key_of([int(shard) for shard in self.shards])
        return f"{self.num_shards} of layout {layout[:16]}"


def window_size(shard_bytes: Sequence[int], room_bytes: int) -> int:
    """Return the largest n for which `2 n - 1` shards fit into `room_bytes`, from 1 to all shards."""
    if sum(shard_bytes) <= room_bytes:
        return len(shard_bytes)
    largest = np.cumsum(sorted(shard_bytes, reverse=True))
    kept = int(np.searchsorted(largest, room_bytes, side="right"))
    return max(1, (kept + 1) // 2)


def global_batch(
    view_hash: str,
    seed: int,
    places: Sequence[tuple[int, int]],
    global_batch_size: int,
    step: int,
    windows: Windows | None = None,
) -> tuple[Draw, ...]:
    """Return the clips of optimizer step `step` (from 0) in stream order; None as `windows` shuffles whole epochs.

    `places` are those of one epoch, see `epoch_places`.
    """
    num_places = len(places)
    assert num_places > 0, "num_train_steps refuses an empty view"
    assert global_batch_size > 0
    assert step >= 0
    draws: list[Draw] = []
    position, end = step * global_batch_size, (step + 1) * global_batch_size
    while position < end:
        epoch, start = divmod(position, num_places)
        stop = min(num_places, start + end - position)
        if windows is None:
            order = _epoch_order(view_hash, seed, num_places, epoch)
        else:
            order = _windowed_order(view_hash, seed, windows, epoch)
        draws += [Draw(epoch, *places[place]) for place in order[start:stop].tolist()]
        position += stop - start
    return tuple(draws)


def epoch_places(repeats: Sequence[int]) -> list[tuple[int, int]]:
    """Return (row, repetition) of every place of an epoch; `repeats` is per row of the view's canonical order."""
    return [(row, repetition) for row, count in enumerate(repeats) for repetition in range(count)]


def num_train_steps(num_places: int, global_batch_size: int, max_train_steps: int | None, num_train_epochs: int) -> int:
    """Return the optimizer steps of the run: `max_train_steps`, or enough to train each clip in every epoch.

    The last batch is filled from the next epoch. Raises `DataError` for a view without clips.
    """
    if num_places < 1:
        raise DataError("data.name: the view has no training clips; check its skipped clips and data.held_out_clips")
    if max_train_steps is not None:
        return max_train_steps
    return -(-num_train_epochs * num_places // global_batch_size)


def pack_cost(tokens: int, width: int) -> int:
    """Return the FLOPs of one block's forward on one clip: 24 d^2 S (linear layers) + 4 S^2 d (attention)."""
    return 24 * width**2 * tokens + 4 * tokens**2 * width


def divide(tokens: Sequence[int], width: int, world_size: int, max_tokens_per_pack: int) -> tuple[Packs, ...]:
    """Return [rank][pack][index into the batch] for clips of `tokens` each; every index once, ranks may be empty.

    Ranks are balanced by cost, longest processing time first: no rank is above the mean by more than one clip. Within
    a rank the clips are packed by best fit decreasing. A clip above `max_tokens_per_pack` is a pack of its own.
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
def _epoch_order(view_hash: str, seed: int, num_places: int, epoch: int) -> npt.NDArray[np.int64]:
    """Sort raw Philox words into the epoch's permutation; `Generator.permutation` may change with numpy's version."""
    words = generator("order", view_hash, seed, epoch).bit_generator.random_raw(num_places)
    return np.argsort(words, kind="stable")


@lru_cache(maxsize=2)
def _windowed_order(view_hash: str, seed: int, windows: Windows, epoch: int) -> npt.NDArray[np.int64]:
    """Return the epoch's permutation: the shard at place p of a permutation of shards is read from time p to p + n.

    Each clip has a time drawn uniformly from that interval, so n shards are in use at any time and each is equally
    likely. Before time n - 1 and after the last shard has begun there are fewer: those clips are shuffled separately.
    """
    size, num_shards = windows.num_shards, int(windows.shards.max()) + 1
    draw = generator("windows", view_hash, seed, epoch).bit_generator
    places = np.empty(num_shards, np.int64)
    places[np.argsort(draw.random_raw(num_shards), kind="stable")] = np.arange(num_shards)
    fractions, again = ((draw.random_raw(len(windows.shards)) >> np.uint64(11)) * 2.0**-53 for _ in range(2))
    times = places[windows.shards] + size * fractions
    part = (times >= num_shards).astype(np.int64) - (times < size - 1)
    return np.lexsort((np.where(part == 0, times, again), part))

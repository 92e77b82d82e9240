"""Who makes what: the wanted keys that are not stored, grouped into shards and encode batches, written once.

A plan's name is the hash of all wanted keys, so workers that start at other times or on other machines find the same
plan and never group differently. Work is divided without talking: a worker makes its own share, then helps from the
far end of the others'.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from shared.errors import CacheError
from shared.files import Storage
from shared.fingerprint import key_of
from shared.shard import RECEIPT_BYTES, shard_name
from shared.store import Collection, shards

MAX_GENERATIONS = 100


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """The unit of work, retry and resume."""

    folder: str
    batches: tuple[tuple[str, ...], ...]
    """Keys that are encoded together."""
    attempt: int
    """How often these clips had been skipped before."""

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(key for batch in self.batches for key in batch)

    @property
    def receipt(self) -> str:
        return f"{self.folder}/{shard_name(self.keys, self.attempt)}.json"


@dataclass(frozen=True, slots=True)
class Part:
    """A worker's share: number `index` (from 0) of `count`."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a collection holds of the wanted keys."""

    stored: frozenset[str]
    skipped: dict[str, tuple[str, int]]
    """Key -> reason and attempt of the newest receipt that skipped it."""


def take_inventory(storage: Storage, collection: Collection) -> Inventory:
    """Read all receipts of the collection."""
    stored: set[str] = set()
    skipped: dict[str, tuple[str, int]] = {}
    for _, receipt in shards(storage, collection.folder):
        stored.update(place.key for place in receipt.samples)
        for key, reason in receipt.skipped.items():
            if key not in skipped or skipped[key][1] < receipt.attempt:
                skipped[key] = reason, receipt.attempt
    return Inventory(frozenset(stored), {key: value for key, value in skipped.items() if key not in stored})


def missing_keys(wanted: Sequence[str], inventory: Inventory, retry_from: Mapping[str, int]) -> dict[str, int]:
    """Wanted key -> attempt, for what has to be made; keys skipped at their `retry_from` attempt are tried again."""
    missing = {}
    for key in wanted:
        if key in inventory.stored:
            continue
        _, attempt = inventory.skipped.get(key, ("", -1))
        if attempt == -1 or attempt == retry_from.get(key):
            missing[key] = attempt + 1
    return missing


def group(
    missing: Mapping[str, int], folders: Mapping[str, str], *, keys_per_shard: int, keys_per_batch: int
) -> list[PlannedShard]:
    """Missing keys -> shards of one folder (bucket) each, cut into encode batches. The order is by key."""
    groups: dict[tuple[str, int], list[str]] = {}
    for key, attempt in sorted(missing.items()):
        groups.setdefault((folders[key], attempt), []).append(key)
    planned = []
    for (folder, attempt), keys in sorted(groups.items()):
        for start in range(0, len(keys), keys_per_shard):
            chosen = keys[start : start + keys_per_shard]
            batches = [tuple(chosen[i : i + keys_per_batch]) for i in range(0, len(chosen), keys_per_batch)]
            planned.append(PlannedShard(folder, tuple(batches), attempt))
    return planned


def agree(storage: Storage, wanted: Sequence[str], generation: int, proposal: list[PlannedShard]) -> list[PlannedShard]:
    """Write the plan unless another worker has; everybody gets the one that is there.

    Raises `CacheError` if the plan there is damaged.
    """
    name = f"plans/{key_of([sorted(wanted), generation])}.json"
    storage.publish(name, json.dumps([asdict(shard) for shard in proposal]).encode())
    return read_plan(storage, name)


def read_plan(storage: Storage, name: str) -> list[PlannedShard]:
    """Raises `CacheError` naming the file if it is damaged."""
    try:
        entries = json.loads(storage.read(name, limit_bytes=16 * RECEIPT_BYTES))
        return [
            PlannedShard(entry["folder"], tuple(tuple(batch) for batch in entry["batches"]), entry["attempt"])
            for entry in entries
        ]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CacheError(f"{storage}/{name}: damaged plan ({error}); delete this file and run again") from None


def existing_plan(storage: Storage, wanted: Sequence[str], generation: int) -> list[PlannedShard] | None:
    """The plan of that generation if some worker has written it."""
    name = f"plans/{key_of([sorted(wanted), generation])}.json"
    return read_plan(storage, name) if storage.exists(name) else None


def still_to_make(storage: Storage, planned: Sequence[PlannedShard], part: Part) -> Iterator[PlannedShard]:
    """Shards without a receipt, looked up when asked for: first this worker's share, then the others' from the end."""
    own = [shard for index, shard in enumerate(planned) if index % part.count == part.index]
    others = [shard for index, shard in enumerate(planned) if index % part.count != part.index]
    for shard in [*own, *reversed(others)]:
        if not storage.exists(shard.receipt):
            yield shard


def make_missing(
    storage: Storage,
    collection: Collection,
    folders: Mapping[str, str],
    make: Callable[[Iterator[PlannedShard], int], None],
    part: Part,
    *,
    keys_per_shard: int,
    keys_per_batch: int,
    retry_skipped: bool = False,
) -> Inventory:
    """Plan what is missing, have it made, and look again until everything wanted is stored or skipped.

    `folders`: wanted key -> folder. `make` gets the shards to make and how many samples they hold.
    Raises `CacheError` if keys stay missing.
    """
    wanted = sorted(folders)
    inventory = take_inventory(storage, collection)
    retry_from = {key: attempt for key, (_, attempt) in inventory.skipped.items()} if retry_skipped else {}
    for generation in range(MAX_GENERATIONS):
        planned = existing_plan(storage, wanted, generation)
        if planned is None:
            missing = missing_keys(wanted, inventory, retry_from)
            if not missing:
                return inventory
            proposal = group(missing, folders, keys_per_shard=keys_per_shard, keys_per_batch=keys_per_batch)
            planned = agree(storage, wanted, generation, proposal)
        todo = [shard for shard in planned if not storage.exists(shard.receipt)]
        if todo:
            make(still_to_make(storage, planned, part), sum(len(shard.keys) for shard in todo))
            inventory = take_inventory(storage, collection)
    raise CacheError(f"{storage}/{collection.folder}: samples stay missing after {MAX_GENERATIONS} plans")

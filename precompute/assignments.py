"""Who makes what: the wanted keys that are not stored, grouped into shards and encode batches, written once.

A plan's name is the hash of all wanted keys, so workers that start at other times or on other machines find the same
plan and never group differently. Work is divided without talking: a worker makes its own share, then helps from the
far end of the others'.
"""

import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from shared.cache.collection import PLAN_BYTES, Collection, shards
from shared.cache.shard import shard_name
from shared.cache.storage import Storage
from shared.errors import CacheError
from shared.fingerprint import key_of

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


def agree(
    storage: Storage, folders: Mapping[str, str], generation: int, proposal: list[PlannedShard]
) -> list[PlannedShard]:
    """Write the plan unless another worker has; everybody gets the one that is there.

    Raises `CacheError` if the plan there is damaged.
    """
    storage.publish(plan_name(folders, generation), json.dumps([asdict(shard) for shard in proposal]).encode())
    return read_plan(storage, folders, generation)


def plan_name(folders: Mapping[str, str], generation: int) -> str:
    """Named by all wanted keys, so that every worker of a run looks in the same place."""
    return f"plans/{key_of([sorted(folders), generation])}.json"


def read_plan(storage: Storage, folders: Mapping[str, str], generation: int) -> list[PlannedShard]:
    """Raises `CacheError` naming the file if it is damaged."""
    name = plan_name(folders, generation)
    try:
        entries = json.loads(storage.read(name, limit_bytes=PLAN_BYTES))
        if not isinstance(entries, list):
            raise ValueError("not a list of shards")
        planned = [
            PlannedShard(entry["folder"], tuple(tuple(batch) for batch in entry["batches"]), entry["attempt"])
            for entry in entries
        ]
        if any(folders[key] != shard.folder for shard in planned for key in shard.keys):
            raise ValueError("a key lies in another folder than its bucket's")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CacheError(f"{storage}/{name}: damaged plan ({error}); delete this file and run again") from None
    return planned


def still_to_make(
    storage: Storage, planned: Sequence[PlannedShard], inventory: Inventory, part: Part
) -> Iterator[PlannedShard]:
    """Unmade shards, looked up when asked for: first this worker's share, then the others'.

    Each worker goes through those in an order of its own, so that two that are done rarely help with the same shard. A
    shard with a key that another plan has stored meanwhile is left out; its other keys are the next generation's.
    """
    own = [shard for index, shard in enumerate(planned) if index % part.count == part.index]
    others = [shard for index, shard in enumerate(planned) if index % part.count != part.index]
    others.sort(key=lambda shard: key_of([part.index, shard.receipt]))
    for shard in [*own, *others]:
        if inventory.stored.isdisjoint(shard.keys) and not storage.exists(shard.receipt):
            yield shard


def propose(
    storage: Storage,
    folders: Mapping[str, str],
    inventory: Inventory,
    *,
    keys_per_shard: int,
    keys_per_batch: int,
    retry_skipped: bool = False,
) -> list[PlannedShard]:
    """What a worker that comes now would make, without writing anything: the rest of a plan, or else a new one."""
    for generation in range(MAX_GENERATIONS):
        if not storage.exists(plan_name(folders, generation)):
            break
        if todo := list(still_to_make(storage, read_plan(storage, folders, generation), inventory, Part())):
            return todo
    missing = missing_keys(sorted(folders), inventory, _retry_from(inventory, retry_skipped))
    return group(missing, folders, keys_per_shard=keys_per_shard, keys_per_batch=keys_per_batch)


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
    given_up: Container[str] = frozenset(),
) -> Inventory:
    """Plan what is missing, have it made, and look again until everything wanted is stored, skipped or given up.

    `folders`: wanted key -> folder. `make` gets the shards to make and how many samples they hold, and adds to
    `given_up` the keys that nobody could make now; they are the next run's.
    Raises `CacheError` if keys stay missing.
    """
    inventory = take_inventory(storage, collection)
    retry_from = _retry_from(inventory, retry_skipped)
    for generation in range(MAX_GENERATIONS):
        if storage.exists(plan_name(folders, generation)):
            planned = read_plan(storage, folders, generation)
        else:
            if generation:  # what other workers have stored since then must not be planned again
                inventory = take_inventory(storage, collection)
            wanted = [key for key in sorted(folders) if key not in given_up]
            missing = missing_keys(wanted, inventory, retry_from)
            if not missing:
                return inventory
            proposal = group(missing, folders, keys_per_shard=keys_per_shard, keys_per_batch=keys_per_batch)
            planned = agree(storage, folders, generation, proposal)
        todo = list(still_to_make(storage, planned, inventory, part))
        if todo:
            make(still_to_make(storage, todo, inventory, Part()), sum(len(shard.keys) for shard in todo))
    raise CacheError(f"{storage}/{collection.folder}: samples stay missing after {MAX_GENERATIONS} plans")


def _retry_from(inventory: Inventory, retry_skipped: bool) -> dict[str, int]:
    return {key: attempt for key, (_, attempt) in inventory.skipped.items()} if retry_skipped else {}

"""Assignments: missing keys grouped into shards and encode batches, written once, the same for every worker.

An assignment file is named by the hash of all wanted keys, so workers that start at other times or on other machines
find the same file and never group differently. Workers do not communicate: each makes its own share, then helps with
the shares of the other workers.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from pydantic import TypeAdapter

from shared.cache.collection import Collection
from shared.cache.index import read_samples
from shared.cache.shard import shard_name
from shared.cache.storage import VERIFY, Storage
from shared.cache.verify import read_assignment
from shared.errors import CacheError, one_line
from shared.fingerprint import key_of, sealed

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


SHARDS = TypeAdapter(list[PlannedShard])


@dataclass(frozen=True, slots=True)
class Part:
    """A worker's share: number `index` (from 0) of `count`."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True)
class Inventory:
    """The contents of a collection, by its receipts."""

    receipts: frozenset[str] = frozenset()
    stored: frozenset[str] = frozenset()
    """Keys with a sample."""
    skipped: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Key -> reason and attempt of the newest receipt that skipped it."""
    sample_bytes: Mapping[str, int] = field(default_factory=dict)
    tar_bytes: int = 0
    """Of all tars."""
    num_parsed: int = 0
    """Receipts that were not in the index."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The keys of one collection that a run needs, and the sizes of new shards."""

    collection: Collection
    folders: Mapping[str, str]
    """Key -> folder of its bucket."""
    keys_per_shard: int
    keys_per_batch: int
    retry: Mapping[str, int] = field(default_factory=dict)
    """Skipped key -> attempt, for keys that are tried once more."""

    def missing(self, inventory: Inventory, given_up: Container[str] = frozenset()) -> dict[str, int]:
        """Return key -> attempt of the keys to make; a skipped key is missing only if it is to be retried."""
        missing = {}
        for key in sorted(self.folders):
            _, attempt = inventory.skipped.get(key, ("", -1))
            if key not in inventory.stored and key not in given_up and attempt in (-1, self.retry.get(key)):
                missing[key] = attempt + 1
        return missing


def take_inventory(storage: Storage, collection: Collection, before: Inventory | None = None) -> Inventory:
    """List the collection, and read the receipts that `before` does not hold."""
    before = before or Inventory()
    found = read_samples(storage, collection.folder, before.receipts)
    sizes = {**before.sample_bytes, **dict(zip(found.keys, found.rows["length"].tolist(), strict=True))}
    stored = before.stored | sizes.keys()
    skipped = dict(before.skipped)
    for receipt in found.receipts:
        for key, reason in receipt.skipped.items():
            if key not in skipped or skipped[key][1] < receipt.attempt:
                skipped[key] = reason, receipt.attempt
    return Inventory(
        before.receipts.union(receipt.name for receipt in found.receipts),
        stored,
        {key: value for key, value in skipped.items() if key not in stored},
        sizes,
        before.tar_bytes + sum(receipt.size for receipt in found.receipts),
        before.num_parsed + found.num_parsed,
    )


def group(wanted: Wanted, missing: Mapping[str, int]) -> list[PlannedShard]:
    """Group missing keys into shards of one folder (bucket) each, cut into encode batches, ordered by key."""
    groups: dict[tuple[str, int], list[str]] = {}
    for key, attempt in sorted(missing.items()):
        groups.setdefault((wanted.folders[key], attempt), []).append(key)
    return [
        PlannedShard(folder, tuple(_cut(chosen, wanted.keys_per_batch)), attempt)
        for (folder, attempt), keys in sorted(groups.items())
        for chosen in _cut(keys, wanted.keys_per_shard)
    ]


def _cut(keys: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    return (tuple(keys[start : start + size]) for start in range(0, len(keys), size))


def assignment_name(wanted: Wanted, generation: int) -> str:
    """Return the name of an assignment file: the hash of all wanted keys."""
    return f"assignments/{key_of([sorted(wanted.folders), generation])}.json"


def assigned_shards(storage: Storage, wanted: Wanted, generation: int) -> list[PlannedShard]:
    """Read an assignment file; raises `CacheError` naming it if it is damaged."""
    name = assignment_name(wanted, generation)
    try:
        planned = SHARDS.validate_python(read_assignment(storage, name))
        if any(wanted.folders.get(key) != shard.folder for shard in planned for key in shard.keys):
            raise ValueError("a key has another bucket")
    except ValueError as error:
        raise CacheError(f"{storage}/{name}: damaged ({one_line(error)}); {VERIFY}") from None
    return planned


def propose(storage: Storage, wanted: Wanted, inventory: Inventory) -> list[PlannedShard]:
    """Return the shards that a new worker would make, without writing anything."""
    return _next_shards(storage, wanted, inventory, Part(), wanted.missing(inventory), write=False)


def shards_to_make(
    storage: Storage, wanted: Wanted, inventory: Inventory, part: Part, given_up: Container[str] = frozenset()
) -> tuple[list[PlannedShard], Inventory]:
    """Return the shards to make next, and the inventory brought up to date; no shards when nothing is missing.

    A worker's share comes first, then the other workers' shards in an order of its own, so that two helpers rarely
    make the same shard. Keys in `given_up` are left to the next run. Call it again when the shards are made.
    Raises `CacheError` for a damaged file.
    """
    if not wanted.missing(inventory, given_up):
        return [], inventory
    inventory = take_inventory(storage, wanted.collection, inventory)  # other workers store shards all the time
    missing = wanted.missing(inventory, given_up)
    return _next_shards(storage, wanted, inventory, part, missing, write=True), inventory


def _next_shards(
    storage: Storage, wanted: Wanted, inventory: Inventory, part: Part, missing: Mapping[str, int], *, write: bool
) -> list[PlannedShard]:
    """Return the unfinished shards of the first assignment that has some, else of a new one; a worker's own first."""
    if not missing:
        return []
    for generation in range(MAX_GENERATIONS):
        name = assignment_name(wanted, generation)
        if storage.size(name) is None:
            proposal = group(wanted, missing)
            if not write:
                return proposal
            body = {"name": name, "shards": [asdict(shard) for shard in proposal]}
            storage.publish(name, sealed(body))  # the first writer wins
        planned = assigned_shards(storage, wanted, generation)
        own = planned[part.index :: part.count]
        others = [shard for index, shard in enumerate(planned) if index % part.count != part.index]
        unfinished = [
            shard
            for shard in own + sorted(others, key=lambda shard: key_of([part.index, shard.receipt]))
            if shard.receipt not in inventory.receipts
            and inventory.stored.isdisjoint(shard.keys)  # else another data set stored some: the next generation's
            and not missing.keys().isdisjoint(shard.keys)
        ]
        if unfinished:
            return unfinished
    where = f"{storage}/{wanted.collection.folder}"
    raise CacheError(f"{where}: samples stay missing after {MAX_GENERATIONS} assignments; {VERIFY}")


def unmade(storage: Storage, planned: Sequence[PlannedShard]) -> Iterator[PlannedShard]:
    """Yield each shard unless another worker has made it by then."""
    return (shard for shard in planned if storage.size(shard.receipt) is None)

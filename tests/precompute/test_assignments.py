"""Assignments: the same for every worker, disjoint shares, nothing assigned that is stored."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.shards import write_shard
from precompute.assignments import (
    Inventory,
    Part,
    PlannedShard,
    Wanted,
    assigned_shards,
    assignment_name,
    group,
    propose,
    shards_to_make,
    take_inventory,
    unmade,
)
from shared.cache.collection import Collection
from shared.cache.shard import Sample
from shared.cache.storage import LocalStorage
from shared.errors import CacheError
from shared.fingerprint import key_of, sealed

LATENTS = Collection("latents", "r")
KEYS = sorted(key_of(number) for number in range(20))


def wanted_of(
    keys: list[str], per_shard: int = 2, per_batch: int = 1, *, buckets: int = 1, retry: Mapping[str, int] | None = None
) -> Wanted:
    folders = {key: f"latents/r/{int(key, 16) % buckets}" for key in keys}
    return Wanted(LATENTS, folders, per_shard, per_batch, retry or {})


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path))


def store(storage: LocalStorage, shard: PlannedShard, skipped: dict[str, str] | None = None) -> None:
    samples = [Sample(key, {}, {}) for key in shard.keys if key not in (skipped or {})]
    skips = {key: reason for key, reason in (skipped or {}).items() if key in shard.keys}
    write_shard(storage, shard.folder, samples, skips, shard.attempt)


def make_all(
    storage: LocalStorage,
    wanted: Wanted,
    part: Part = Part(),  # noqa: B008
    skipped: dict[str, str] | None = None,
) -> tuple[list[PlannedShard], Inventory]:
    """Make what is missing; return the shards made here and the inventory at the end."""
    made: list[PlannedShard] = []
    shards, inventory = shards_to_make(storage, wanted, take_inventory(storage, LATENTS), part)
    while shards:
        for shard in unmade(storage, shards):
            store(storage, shard, skipped)
            made.append(shard)
        shards, inventory = shards_to_make(storage, wanted, inventory, part)
    return made, inventory


@given(st.permutations(KEYS), st.integers(1, 7), st.integers(1, 7))
def test_grouping_ignores_the_order_and_loses_no_key(keys: list[str], per_shard: int, per_batch: int) -> None:
    wanted = wanted_of(keys, per_shard, per_batch, buckets=3)
    planned = group(wanted, dict.fromkeys(keys, 0))
    assert planned == group(wanted, dict.fromkeys(KEYS, 0))
    assert sorted(key for shard in planned for key in shard.keys) == KEYS
    for shard in planned:
        assert len(shard.keys) <= per_shard and all(len(batch) <= per_batch for batch in shard.batches)
        assert {wanted.folders[key] for key in shard.keys} == {shard.folder}


@pytest.mark.parametrize(("num_keys", "count"), [(1, 3), (7, 1), (20, 3), (20, 12)])
def test_shares_are_disjoint_and_every_worker_would_make_all(storage: LocalStorage, num_keys: int, count: int) -> None:
    wanted = wanted_of(KEYS[:num_keys], per_shard=1)
    orders = [shards_to_make(storage, wanted, Inventory(), Part(index, count))[0] for index in range(count)]
    planned = assigned_shards(storage, wanted, 0)
    for index, order in enumerate(orders):
        share = planned[index::count]
        assert order[: len(share)] == share
        assert sorted(shard.receipt for shard in order) == sorted(shard.receipt for shard in planned)
    assert len(list(storage.files("assignments"))) == 1


def test_share_does_not_shift_when_others_have_stored_shards(storage: LocalStorage) -> None:
    wanted = wanted_of(KEYS)
    planned, _ = shards_to_make(storage, wanted, Inventory(), Part())
    for index in (0, 4):
        store(storage, planned[index])
    order, _ = shards_to_make(storage, wanted, Inventory(), Part(1, 3))
    assert [planned.index(shard) for shard in order[:2]] == [1, 7] and len(order) == len(planned) - 2


def test_shards_made_meanwhile_are_left_out(storage: LocalStorage) -> None:
    planned, _ = shards_to_make(storage, wanted_of(KEYS), Inventory(), Part())
    stream = unmade(storage, planned)
    assert next(stream) == planned[0]
    store(storage, planned[1])
    assert next(stream) == planned[2]


def test_idle_workers_seldom_make_the_same_shard(storage: LocalStorage) -> None:
    """Time in shards: sixteen workers of ten shards each, two of which never come."""
    wanted = wanted_of([key_of(number) for number in range(160)], per_shard=1)
    orders = [shards_to_make(storage, wanted, Inventory(), Part(index, 16))[0] for index in range(14)]
    made: set[str] = set()
    encoded = rounds = 0
    while len(made) < 160:
        nexts = [next((shard.receipt for shard in order if shard.receipt not in made), None) for order in orders]
        under_way = [receipt for receipt in nexts if receipt is not None]
        made |= set(under_way)
        encoded += len(under_way)
        rounds += 1
    assert rounds <= 15, "11.4 is ideal"
    assert encoded <= 190, "160 is ideal"


def test_first_assignment_wins(storage: LocalStorage) -> None:
    first, _ = shards_to_make(storage, wanted_of(KEYS, 4, 2), Inventory(), Part())
    assert shards_to_make(storage, wanted_of(KEYS, 7, 1), Inventory(), Part())[0] == first
    assert propose(storage, wanted_of(KEYS, 7, 1), Inventory()) == first
    names = {assignment_name(wanted_of(KEYS), 0), assignment_name(wanted_of(KEYS), 1)}
    assert len({*names, assignment_name(wanted_of(KEYS[1:]), 0)}) == 3


def test_worker_that_comes_too_late_takes_the_first_assignment(tmp_path: Path) -> None:
    class Late(LocalStorage):
        """A folder in which the assignment of another worker appears after the look for it."""

        def size(self, name: str) -> int | None:
            return None if name.startswith("assignments/") else super().size(name)

    first, _ = shards_to_make(Late(str(tmp_path)), wanted_of(KEYS, 4, 2), Inventory(), Part())
    assert shards_to_make(Late(str(tmp_path)), wanted_of(KEYS, 7, 1), Inventory(), Part())[0] == first


def test_damaged_or_foreign_assignment_is_refused(storage: LocalStorage) -> None:
    wanted = wanted_of(KEYS)
    name = assignment_name(wanted, 0)
    good = asdict(group(wanted, {KEYS[0]: 0})[0])
    bodies: list[dict[str, object]] = [
        {},
        {"name": name, "shards": [1]},
        {"name": "another", "shards": [good]},
        {"name": name, "shards": [good | {"folder": "../../etc"}]},
        {"name": name, "shards": [good | {"batches": [[key_of("not wanted")]]}]},
    ]
    whole = sealed({"name": name, "shards": [good]})
    for content in (b"", b"[", whole[:-3], whole.replace(b'"attempt": 0', b'"attempt": 1'), *map(sealed, bodies)):
        storage.publish(name, content, replace=True)
        with pytest.raises(CacheError, match=rf"{name}: damaged .*; run `precog cache verify --repair`"):
            assigned_shards(storage, wanted, 0)
    storage.publish(name, whole, replace=True)
    assert len(assigned_shards(storage, wanted, 0)) == 1


def test_everything_is_stored_at_the_end_and_nothing_twice(storage: LocalStorage) -> None:
    old = take_inventory(storage, LATENTS)
    first, inventory = make_all(storage, wanted_of(KEYS[:12], 3, 2, buckets=2))
    assert inventory.stored == frozenset(KEYS[:12])
    second, inventory = make_all(storage, wanted_of(KEYS, 3, 2, buckets=2), Part(1, 2))
    assert inventory.stored == frozenset(KEYS)
    assert sorted(key for shard in first + second for key in shard.keys) == KEYS
    assert make_all(storage, wanted_of(KEYS[3:], 3, 2, buckets=2))[0] == []
    shards, inventory = shards_to_make(storage, wanted_of(KEYS, 6, buckets=2), old, Part())
    assert shards == [] and inventory.stored == frozenset(KEYS), "stored after the inventory"


def test_shards_of_another_data_set_are_not_made_again(storage: LocalStorage) -> None:
    """Data set A stops after its first shard; B wants more, groups otherwise and finishes; A continues."""
    wanted = wanted_of(KEYS[:12], 5)
    shards, _ = shards_to_make(storage, wanted, Inventory(), Part())
    store(storage, shards[0])
    assert len(make_all(storage, wanted_of(KEYS, 4))[0]) == 4
    assert make_all(storage, wanted)[0] == []


def test_skipped_key_is_retried_only_on_demand(storage: LocalStorage) -> None:
    wanted, bad = wanted_of(KEYS[:4], 4), KEYS[1]
    for retry, attempt in ((False, 0), (False, 0), (True, 1), (True, 2)):
        before = take_inventory(storage, LATENTS)
        attempts = {key: attempt for key, (_, attempt) in before.skipped.items()}
        made, found = make_all(
            storage, replace(wanted, retry=attempts if retry else {}), skipped={bad: f"reason {attempt}"}
        )
        assert found.skipped == {bad: (f"reason {attempt}", attempt)} and found.stored == frozenset(KEYS[:4]) - {bad}
        assert len(made) == (attempt not in {a for _, a in before.skipped.values()})
    _, found = make_all(storage, replace(wanted, retry={bad: 2}))
    assert found.stored == frozenset(KEYS[:4]) and found.skipped == {}


def test_given_up_keys_are_left_to_the_next_run(storage: LocalStorage) -> None:
    wanted, lost = wanted_of(KEYS[:6], 3), set(KEYS[:4])
    shards, inventory = shards_to_make(storage, wanted, Inventory(), Part())
    for shard in shards:
        kept = tuple(key for key in shard.keys if key not in lost)
        if kept:
            store(storage, PlannedShard(shard.folder, (kept,), shard.attempt))
    assert shards_to_make(storage, wanted, inventory, Part(), lost)[0] == []
    made, inventory = make_all(storage, wanted)
    assert inventory.stored == frozenset(KEYS[:6]) and sorted(key for s in made for key in s.keys) == KEYS[:4]


def test_proposal_is_what_would_be_made_and_writes_nothing(storage: LocalStorage, tmp_path: Path) -> None:
    wanted = wanted_of(KEYS[:6])
    planned = propose(storage, wanted, Inventory())
    assert len(planned) == 3 and list(tmp_path.iterdir()) == []
    assert shards_to_make(storage, wanted, Inventory(), Part())[0] == planned
    store(storage, planned[0])
    assert propose(storage, wanted_of(KEYS[:6], 5, 5), take_inventory(storage, LATENTS)) == planned[1:]

"""Who makes what: the same plan for everybody, disjoint shares, nothing planned that is stored."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precompute.assignments import (
    Inventory,
    Part,
    PlannedShard,
    agree,
    group,
    make_missing,
    missing_keys,
    plan_name,
    propose,
    read_plan,
    still_to_make,
    take_inventory,
)
from shared.cache.collection import Collection
from shared.cache.shard import Sample, write_shard
from shared.cache.storage import LocalStorage
from shared.errors import CacheError
from shared.fingerprint import key_of

LATENTS = Collection("latents", "r")
KEYS = sorted(key_of(number) for number in range(20))
NOTHING = Inventory(frozenset(), {})


def folders_of(keys: list[str]) -> dict[str, str]:
    return {key: f"latents/r/{'a' if int(key, 16) % 3 else 'b'}" for key in keys}


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path))


def store(storage: LocalStorage, shard: PlannedShard, skipped: dict[str, str] | None = None) -> None:
    samples = [Sample(key, {}, {}) for key in shard.keys if key not in (skipped or {})]
    write_shard(storage, shard.folder, samples, skipped, shard.attempt)


def make_all(storage: LocalStorage, made: list[PlannedShard]) -> object:
    def make(todo: Iterator[PlannedShard], _total: int) -> None:
        for shard in todo:
            store(storage, shard)
            made.append(shard)

    return make


@given(st.permutations(KEYS), st.integers(1, 7), st.integers(1, 7))
def test_a_grouping_does_not_depend_on_the_order_and_loses_no_key(keys, per_shard, per_batch):
    planned = group(dict.fromkeys(keys, 0), folders_of(keys), keys_per_shard=per_shard, keys_per_batch=per_batch)
    usual = group(dict.fromkeys(KEYS, 0), folders_of(KEYS), keys_per_shard=per_shard, keys_per_batch=per_batch)
    assert planned == usual
    assert sorted(key for shard in planned for key in shard.keys) == KEYS
    for shard in planned:
        assert len(shard.keys) <= per_shard and all(len(batch) <= per_batch for batch in shard.batches)
        assert {folders_of(KEYS)[key] for key in shard.keys} == {shard.folder}


@given(st.integers(1, 40), st.integers(1, 12))
def test_shares_are_disjoint_and_every_worker_would_do_everything(num_shards, count):
    planned = [PlannedShard("latents/r/a", ((key_of(number),),), 0) for number in range(num_shards)]
    storage = LocalStorage("/nonexistent")
    orders = [list(still_to_make(storage, planned, NOTHING, Part(index, count))) for index in range(count)]
    shares = [[s for n, s in enumerate(planned) if n % count == index] for index in range(count)]
    for order, share in zip(orders, shares, strict=True):
        assert order[: len(share)] == share and sorted(s.receipt for s in order) == sorted(s.receipt for s in planned)
    assert sum(map(len, shares)) == num_shards


def test_a_worker_makes_its_share_and_helps_with_what_is_left(storage):
    planned = group(dict.fromkeys(KEYS, 0), dict.fromkeys(KEYS, "latents/r/a"), keys_per_shard=2, keys_per_batch=1)
    order = [planned.index(shard) for shard in still_to_make(storage, planned, NOTHING, Part(1, 3))]
    assert order[:3] == [1, 4, 7]
    assert sorted(order) == list(range(len(planned)))
    stream = still_to_make(storage, planned, NOTHING, Part(1, 3))
    assert planned.index(next(stream)) == 1
    store(storage, planned[4])  # another worker was there meanwhile
    assert planned.index(next(stream)) == 7


def test_workers_that_are_done_seldom_help_with_the_same_shard():
    """Time in shards: sixteen workers of ten shards each, two of which never come."""
    planned = [PlannedShard(f"latents/r/{number}", ((key_of(number),),), 0) for number in range(160)]
    made: set[str] = set()

    class Made:
        def exists(self, receipt: str) -> bool:
            return receipt in made

    storage: Any = Made()
    workers = [still_to_make(storage, planned, NOTHING, Part(index, 16)) for index in range(14)]
    encoded = rounds = 0
    while len(made) < len(planned):
        under_way = [shard.receipt for worker in workers if (shard := next(worker, None)) is not None]
        made |= set(under_way)
        encoded += len(under_way)
        rounds += 1
    assert rounds <= 15, "11.4 is ideal"
    assert encoded <= 190, "160 is ideal"


def test_everybody_gets_the_plan_that_was_written_first(storage):
    folders = folders_of(KEYS)
    first = group(dict.fromkeys(KEYS, 0), folders, keys_per_shard=4, keys_per_batch=2)
    second = group(dict.fromkeys(KEYS, 0), folders, keys_per_shard=7, keys_per_batch=1)
    assert agree(storage, folders, 0, first) == agree(storage, folders, 0, second) == first
    assert plan_name(folders, 0) != plan_name(folders, 1) != plan_name(folders_of(KEYS[1:]), 0)


def test_a_plan_that_is_damaged_or_points_elsewhere_is_refused(storage):
    folders = folders_of(KEYS)
    path = storage.path(plan_name(folders, 0))
    path.parent.mkdir()
    entry = {"folder": "latents/r/a", "batches": [[KEYS[0]]], "attempt": 0}
    elsewhere = json.dumps([{**entry, "folder": "../../etc"}])
    foreign = json.dumps([{**entry, "batches": [[key_of("not wanted")]]}])
    for content in ("", "[", "{}", "[1]", '[{"folder": 1}]', elsewhere, foreign):
        path.write_text(content)
        with pytest.raises(CacheError, match=r"damaged plan .*; delete this file and run again"):
            read_plan(storage, folders, 0)


def test_making_what_is_missing_ends_with_everything_stored_and_nothing_twice(storage):
    made: list[PlannedShard] = []
    settings = {"keys_per_shard": 3, "keys_per_batch": 2}
    inventory = make_missing(storage, LATENTS, folders_of(KEYS[:12]), make_all(storage, made), Part(), **settings)
    assert inventory.stored == frozenset(KEYS[:12])
    inventory = make_missing(storage, LATENTS, folders_of(KEYS), make_all(storage, made), Part(1, 2), **settings)
    assert inventory.stored == frozenset(KEYS)
    assert sorted(key for shard in made for key in shard.keys) == KEYS
    make_missing(storage, LATENTS, folders_of(KEYS[3:]), make_all(storage, made), Part(), **settings)
    assert sum(len(shard.keys) for shard in made) == len(KEYS)


def test_an_unfinished_plan_does_not_make_again_what_another_data_set_has_made(storage):
    """Plan A stops after its first shard; B wants more, groups otherwise and finishes; A comes back."""
    made: list[PlannedShard] = []
    folders = dict.fromkeys(KEYS[:12], "latents/r/a")

    def one_shard(todo: Iterator[PlannedShard], _total: int) -> None:
        store(storage, next(todo))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_missing(storage, LATENTS, folders, one_shard, Part(), keys_per_shard=5, keys_per_batch=1)
    more = dict.fromkeys(KEYS, "latents/r/a")
    make_missing(storage, LATENTS, more, make_all(storage, made), Part(), keys_per_shard=4, keys_per_batch=1)
    assert len(made) == 4
    make_missing(storage, LATENTS, folders, make_all(storage, made), Part(), keys_per_shard=5, keys_per_batch=1)
    assert len(made) == 4


def test_what_is_finished_between_looking_and_planning_is_not_planned_again(tmp_path):
    """The other worker's last receipt appears just after this one has read the receipts."""
    folders = dict.fromkeys(KEYS[:6], "latents/r/a")
    planned = group(dict.fromkeys(folders, 0), folders, keys_per_shard=2, keys_per_batch=1)

    class Crowded(LocalStorage):
        def names(self, folder: str, suffix: str) -> list[str]:
            found = super().names(folder, suffix)
            for shard in planned:
                store(LocalStorage(str(tmp_path)), shard)
            return found

    storage = Crowded(str(tmp_path))
    agree(storage, folders, 0, planned)
    made: list[PlannedShard] = []
    inventory = make_missing(
        storage, LATENTS, folders, make_all(storage, made), Part(), keys_per_shard=6, keys_per_batch=1
    )
    assert made == [] and inventory.stored == frozenset(folders)
    assert len(list((tmp_path / "plans").iterdir())) == 1


def test_a_skipped_key_stays_skipped_until_it_is_asked_for_again(storage):
    folders, bad = dict.fromkeys(KEYS[:4], "latents/r/a"), KEYS[1]

    def make(todo: Iterator[PlannedShard], _total: int) -> None:
        for shard in todo:
            store(storage, shard, {bad: f"reason {shard.attempt}"} if bad in shard.keys else {})

    settings = {"keys_per_shard": 4, "keys_per_batch": 1}
    for retry, reason in ((False, "reason 0"), (False, "reason 0"), (True, "reason 1"), (True, "reason 2")):
        found = make_missing(storage, LATENTS, folders, make, Part(), retry_skipped=retry, **settings)
        assert found.skipped[bad][0] == reason and found.stored == frozenset(folders) - {bad}
    found = make_missing(storage, LATENTS, folders, make_all(storage, []), Part(), retry_skipped=True, **settings)
    assert found.stored == frozenset(folders) and found.skipped == {}


def test_a_proposal_is_what_would_be_made_and_writes_nothing(storage, tmp_path):
    folders = dict.fromkeys(KEYS[:6], "latents/r/a")
    settings = {"keys_per_shard": 2, "keys_per_batch": 1}
    planned = propose(storage, folders, NOTHING, **settings)
    assert len(planned) == 3 and list(tmp_path.iterdir()) == []
    agree(storage, folders, 0, planned)
    store(storage, planned[0])
    inventory = take_inventory(storage, LATENTS)
    assert propose(storage, folders, inventory, keys_per_shard=5, keys_per_batch=5) == planned[1:]


def test_missing_is_what_is_neither_stored_nor_given_up():
    inventory = Inventory(frozenset({"a"}), {"b": ("broken", 0), "c": ("broken", 2)})
    assert missing_keys(["a", "b", "c", "d"], inventory, {}) == {"d": 0}
    assert missing_keys(["a", "b", "c", "d"], inventory, {"b": 0, "c": 1}) == {"b": 1, "d": 0}

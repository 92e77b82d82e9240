"""`cache gc`, `pull` and `push`: nothing that a view names is ever lost, whatever is killed, and nothing else stays."""

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from bench.shards import write_shard
from shared.cache.collection import collection_for, shards, write_recipe
from shared.cache.garbage import find_garbage, remove_garbage
from shared.cache.storage import LocalStorage, Storage
from shared.cache.transfer import find_sample, find_transfer, transfer
from shared.cache.verify import verify
from shared.cache.view import View, read_table_name, read_view, view_names
from shared.errors import CacheError
from shared.fingerprint import Json, key_of, sealed
from tests.corpus import stored_files
from tests.faults.writer import killed_before
from tests.shared.cache.samples import COLLECTION, make_samples, read_whole, store, store_view

DAY = 24 * 3600.0


def age(storage: LocalStorage, pattern: str = "**/*", hours: float = 48) -> None:
    """Make files old."""
    for path in storage.root.glob(pattern):
        os.utime(path, (time.time() - hours * 3600,) * 2, follow_symlinks=False)


def collect(storage: Storage, min_age_seconds: float = -1) -> list[str]:
    """Delete the garbage; return its names."""
    garbage = find_garbage(storage, min_age_seconds)
    remove_garbage(storage, garbage)
    return [*garbage.files]


def copy(source: Storage, target: Storage) -> None:
    found = find_transfer(source, target)
    transfer(source, target, found, [*found.views, *found.different])


def keys_of(storage: Storage) -> list[list[str]]:
    """Return the keys of each shard of latents."""
    return [[place.key for place in receipt.samples] for _, receipt in shards(storage, COLLECTION.folder)]


def test_only_what_no_view_names_is_deleted(storage: LocalStorage) -> None:
    store(storage, 3)
    first, second, _ = keys_of(storage)
    view = store_view(storage, "clips", [first[0], *second])
    litter = {
        f"{COLLECTION.folder}/9x32x48/{'0' * 64}.tar": "tars and tables without a name",
        f"{COLLECTION.folder}/9x32x48/.tmp-1-x.tar": "temporary files",
        "datasets/clips.json.damaged": "damaged files",
        "made_by/gone/x.json": "collections without a shard",
        "assignments/x.json": "assignments of finished runs",
    }
    for name in litter:
        storage.path(name).parent.mkdir(parents=True, exist_ok=True)
        storage.path(name).write_bytes(b"x")
    assert find_garbage(storage, DAY).files == {}, "all is fresh"
    age(storage)
    found = find_garbage(storage, DAY)
    unnamed = {name: why for name, why in found.files.items() if why == "shards that no view names"}
    assert found.files == unnamed | litter and len(unnamed) == 2 and found.sizes.keys() == found.files.keys()
    remove_garbage(storage, found)
    assert keys_of(storage) == [first, second]
    read_whole(storage, view)
    assert collect(storage) == [] and verify(storage, repair=False)[1] == []


def test_old_shards_of_a_run_that_is_going_on_are_kept(storage: LocalStorage) -> None:
    """Its prompts may be days old when its view is written."""
    store(storage, 2)
    age(storage)
    [fresh, *_] = [receipt.name for _, receipt in shards(storage, "latents")]
    os.utime(storage.path(fresh))
    assert (find_garbage(storage, DAY).files, find_garbage(storage, DAY).unfinished) == ({}, 2)
    age(storage)
    name = "assignments/x.json"
    body: dict[str, Json] = {"name": name, "shards": [{"folder": COLLECTION.folder, "batches": [["unmade"]]}]}
    storage.publish(name, sealed(body))
    assert (find_garbage(storage, DAY).files, find_garbage(storage, DAY).unfinished) == ({}, 2)
    age(storage)
    assert len(collect(storage, DAY)) == 2 * 2 + 2, "shards, recipe and assignment"
    assert list(stored_files(storage.root)) == []


def test_tar_of_two_receipts_stays_while_one_is_needed(storage: LocalStorage) -> None:
    """Shards of which every clip was skipped have equal tars."""
    folder = f"{COLLECTION.folder}/9x32x48"
    kept, other = (write_shard(storage, folder, [], {key_of(name): "broken"})[0] for name in ("kept", "other"))
    store_view(storage, "clips", [key_of("kept")])
    assert kept.tar == other.tar and collect(storage) == [other.name]
    assert [receipt for _, receipt in shards(storage, folder)] == [kept]


def test_damaged_view_stops_the_deletion(storage: LocalStorage) -> None:
    store(storage)
    store_view(storage, "clips", keys_of(storage)[0])
    storage.publish("datasets/clips.json", b"{}", replace=True)
    with pytest.raises(CacheError, match="datasets/clips: damaged view"):
        find_garbage(storage, -1)


def test_other_formats_are_named_and_left_alone(storage: LocalStorage, tmp_path: Path) -> None:
    recipe: dict[str, Json] = {"format": 3, "kind": "latents"}
    other = collection_for("latents", recipe)
    write_recipe(storage, other, recipe)
    for name in (f"{other.folder}/9x32x48/x.tar", f"{other.folder}/x.json", f"made_by/{other.recipe}/x.json"):
        storage.publish(name, b"of another version")
    storage.publish("datasets/new.json", b'{"latents": "%s"}' % other.recipe.encode())
    storage.publish("datasets/table.parquet", b"of another version")
    before = stored_files(storage.root)
    assert find_garbage(storage, -1).foreign == {other.folder: 3}
    target = LocalStorage(str(tmp_path / "target"))
    assert collect(storage) == [] and find_transfer(storage, target).foreign == {other.folder: 3}
    copy(storage, target)
    assert stored_files(target.root) == {} and verify(storage, repair=True) == (0, [])
    assert stored_files(storage.root) == before


def test_push_copies_the_same_bytes_and_merges(storage: LocalStorage, tmp_path: Path) -> None:
    store(storage, 2)
    first, second = keys_of(storage)
    views = [store_view(storage, "one", first), store_view(storage, "two", second, ["a text"])]
    target = LocalStorage(str(tmp_path / "target"))
    copy(storage, target)
    assert stored_files(target.root) == stored_files(storage.root)
    assert find_transfer(storage, target).shards == {} and find_transfer(storage, target).views == []
    write_shard(target, f"{COLLECTION.folder}/9x32x48", make_samples(2, 7))
    theirs = store_view(target, "theirs", [key_of([7, 0]), *first])
    store_view(storage, "one", second)
    found = find_transfer(storage, target)
    assert (found.views, found.different) == ([], ["one"])
    transfer(storage, target, found, found.views)
    copy(target, storage)
    for view in (views[0], views[1], theirs):
        read_whole(storage, view)
        read_whole(target, view)


def test_damaged_tar_is_not_copied(storage: LocalStorage, tmp_path: Path) -> None:
    [tar] = store(storage)
    path, target = storage.path(tar), LocalStorage(str(tmp_path / "target"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CacheError, match=f"{tar}: damaged; run `precog cache verify --repair`"):
        copy(storage, target)
    assert shards(target, "latents") == [] and not list(target.root.rglob("*.tar"))


def test_damaged_view_is_not_copied(storage: LocalStorage, tmp_path: Path) -> None:
    store(storage)
    store_view(storage, "clips", keys_of(storage)[0])
    target = LocalStorage(str(tmp_path / "target"))
    storage.path(read_table_name(storage, "datasets/clips.json")).write_bytes(b"damaged")
    with pytest.raises(CacheError, match="datasets/clips: damaged view"):
        copy(storage, target)
    assert target.files("datasets") == {}


def test_view_is_copied_last_and_its_table_before_it(
    storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(storage)
    store_view(storage, "clips", keys_of(storage)[0])
    target, names = LocalStorage(str(tmp_path / "target")), list[str]()
    publish_file = target.publish_file

    def noted(temporary: Path, name: str, *, replace: bool = False) -> bool:
        names.append(name)
        return publish_file(temporary, name, replace=replace)

    monkeypatch.setattr(target, "publish_file", noted)
    copy(storage, target)
    assert names[-2:] == [read_table_name(storage, "datasets/clips.json"), "datasets/clips.json"]
    assert sum(name.endswith(".tar") for name in names[:-2]) == 2


def test_samples_are_found_by_the_start_of_their_key(storage: LocalStorage) -> None:
    store(storage, 2)
    key = keys_of(storage)[0][0]
    assert [(collection, name) for collection, _, name in find_sample(storage, key[:12])] == [(COLLECTION, key)]
    assert len(find_sample(storage, "")) == 4


def random_cache(storage: LocalStorage, draws: random.Random, name: str) -> list[View]:
    """Store shards, of which random views name some samples."""
    write_recipe(storage, COLLECTION, {"kind": "latents", "test": "cache"})
    keys = []
    for seed in draws.sample(range(6), 4):
        write_shard(storage, f"{COLLECTION.folder}/9x32x48", make_samples(2, seed))
        keys += [key_of([seed, number]) for number in range(2)]
    return [
        store_view(
            storage, f"{name}{number}", draws.sample(keys, draws.randrange(1, 4)), [f"text {draws.randrange(3)}"]
        )
        for number in range(draws.randrange(3))
    ]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.faults)])
def test_killed_gc_pull_and_push_lose_nothing(tmp_path: Path, kills: int) -> None:
    killed = trial = 0
    while killed < kills:
        draws = random.Random(trial)
        here, there = (LocalStorage(str(tmp_path / f"{side}{trial}")) for side in ("here", "there"))
        views = {here: random_cache(here, draws, "a"), there: random_cache(there, draws, "b")}
        actions: list[tuple[LocalStorage, Callable[[], object], int]]
        actions = [(here, partial(collect, here), 8), (there, partial(copy, here, there), 60)]
        for storage, action, effects in draws.sample(actions, 2):
            for number in draws.sample(range(effects), 2):
                killed += killed_before(number, action) == -signal.SIGKILL
                check_views(views)
            action()
            check_views(views)
            assert verify(storage, repair=False)[1] == []
        for view in views[here]:
            read_whole(there, view)
        collect(there)
        check_views(views)
        named = {key for name in view_names(there) for key in read_view(there, name).keys[COLLECTION.folder]}
        assert all(named.intersection(keys) for keys in keys_of(there)), "a shard that no view names is left"
        trial += 1


def check_views(views: dict[LocalStorage, list[View]]) -> None:
    for storage, written in views.items():
        for view in written:
            read_whole(storage, view)

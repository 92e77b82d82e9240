"""Test that samples are the same with an index of any state, and that receipts alone decide."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.shards import write_shard
from shared.cache.collection import shards
from shared.cache.garbage import find_garbage
from shared.cache.index import INDEX, ROW, SampleTable, read_samples, write_index
from shared.cache.storage import LocalStorage
from shared.cache.transfer import find_transfer, transfer
from shared.errors import CacheError
from tests.shared.cache.samples import COLLECTION, make_samples, store, store_view

FOLDER = COLLECTION.folder
NAME = f"{FOLDER}/{INDEX}"


def check(storage: LocalStorage, table: SampleTable, num_parsed: int) -> None:
    """Compare the table with the receipts."""
    places = {place.key: (receipt, place) for _, receipt in shards(storage, FOLDER) for place in receipt.samples}
    assert table.keys == sorted(places) and table.num_parsed == num_parsed
    for key, (receipt, place) in places.items():
        found = table.place(key)
        assert found is not None and found[0].name == receipt.name and found[1] == place
    assert table.find(["f" * 32, *places]).tolist() == [-1, *map(table.keys.index, places)]
    assert table.place("f" * 32) is table.place("0") is None


def test_index_saves_parsing_and_follows_the_receipts(storage: LocalStorage) -> None:
    store(storage, 3)
    check(storage, read_samples(storage, FOLDER), 3)
    write_index(storage, FOLDER)
    check(storage, read_samples(storage, FOLDER), 0)
    store(storage, 5)
    check(storage, read_samples(storage, FOLDER), 2)
    known = frozenset(receipt.name for _, receipt in shards(storage, FOLDER)[1:])
    assert len(read_samples(storage, FOLDER, known).receipts) == 1
    write_index(storage, FOLDER)
    gone, other = (receipt for _, receipt in shards(storage, FOLDER)[:2])
    storage.path(gone.name).unlink()
    check(storage, read_samples(storage, FOLDER), 0)
    storage.path(other.name).unlink()
    seed = next(seed for seed in range(5) if make_samples(2, seed)[0].key in {place.key for place in other.samples})
    write_shard(storage, other.folder, make_samples(2, seed, scale=1.1))
    check(storage, read_samples(storage, FOLDER), 1)


def test_damaged_receipt_is_refused_beside_its_index(storage: LocalStorage) -> None:
    store(storage, 2)
    write_index(storage, FOLDER)
    first, second = (storage.path(receipt.name) for _, receipt in shards(storage, FOLDER))
    content = first.read_bytes()
    for wrong in (content.replace(b'"attempt": 0', b'"attempt": 1'), content[:-1], second.read_bytes()):
        first.write_bytes(wrong)
        with pytest.raises(CacheError, match=first.name):
            read_samples(storage, FOLDER)


def test_damaged_index_is_ignored_and_written_again(storage: LocalStorage) -> None:
    store(storage, 2)
    write_index(storage, FOLDER)
    path = storage.path(NAME)
    content, draw = path.read_bytes(), random.Random(0)
    damages = [content[:size] for size in (0, 1, 64, 65, len(content) - ROW.itemsize, len(content) - 1)]
    for _ in range(100):
        at = draw.randrange(len(content))
        damages.append(content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :])
    for damaged in damages:
        path.write_bytes(damaged)
        check(storage, read_samples(storage, FOLDER), 2)
    write_index(storage, FOLDER)
    assert path.read_bytes() == content


@pytest.mark.parametrize("column", ["offset", "length", "shard", "layout"])
def test_index_with_places_outside_their_shards_is_ignored(storage: LocalStorage, column: str) -> None:
    store(storage, 2)
    found = read_samples(storage, FOLDER)
    for value in (2**31, -(2**31)) if column in ("offset", "length") else (7,):
        rows = np.array(found.rows)
        rows[column][1] = value
        storage.publish(NAME, SampleTable(found.receipts, found.digests, found.layouts, rows).as_bytes(), replace=True)
        check(storage, read_samples(storage, FOLDER), 2)
    layouts = [tuple((name, replace(tensor, offset=-8)) for name, tensor in layout) for layout in found.layouts]
    storage.publish(NAME, replace(found, layouts=layouts).as_bytes(), replace=True)
    check(storage, read_samples(storage, FOLDER), 2)


def test_garbage_collection_keeps_the_index_of_shards_alone(storage: LocalStorage) -> None:
    store(storage, 1)
    write_index(storage, FOLDER)
    view = store_view(storage, "clips", read_samples(storage, FOLDER).keys)
    assert NAME not in find_garbage(storage, 0).files
    storage.path(f"datasets/{view.name}.json").unlink()
    for _, receipt in shards(storage, FOLDER):
        storage.path(receipt.name).unlink()
    assert NAME in find_garbage(storage, 0).files


def test_transfer_writes_the_index(storage: LocalStorage, tmp_path: Path) -> None:
    store(storage, 2)
    target = LocalStorage(str(tmp_path / "other"))
    transfer(storage, target, find_transfer(storage, target), [])
    check(target, read_samples(target, FOLDER), 0)

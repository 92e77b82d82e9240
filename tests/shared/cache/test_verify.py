"""`precog cache verify`: every damaged file is named, nothing ends the check, and repair sets files aside."""

import os
import random

import pytest

from shared.cache.collection import Collection, shards
from shared.cache.storage import LocalStorage
from shared.cache.verify import check_shard, verify
from shared.cache.view import View, write_view
from shared.errors import CacheError
from shared.fingerprint import key_of, sealed
from tests.shared.cache.samples import COLLECTION, store


def test_every_flipped_bit_of_a_shard_is_found(storage: LocalStorage) -> None:
    [tar] = store(storage)
    [(_, receipt)] = shards(storage, "latents")
    path, draws = storage.path(tar), random.Random(0)
    content = path.read_bytes()
    for position in draws.sample(range(len(content)), 100):
        flipped = bytearray(content)
        flipped[position] ^= 1 << draws.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(CacheError, match=tar):
            check_shard(storage, receipt.name)
    path.write_bytes(content)
    check_shard(storage, receipt.name)


def test_swapped_files_are_found(storage: LocalStorage) -> None:
    tars = store(storage, 2)
    receipts = [receipt.name for _, receipt in shards(storage, "latents")]
    for names in (tars, receipts):
        one, two = (storage.path(name) for name in names)
        contents = one.read_bytes(), two.read_bytes()
        one.write_bytes(contents[1])
        two.write_bytes(contents[0])
        checked, damaged = verify(storage, repair=False)
        assert checked == 2 and len(damaged) == 2 and names[0] in damaged[0] and names[1] in damaged[1]
        one.write_bytes(contents[0])
        two.write_bytes(contents[1])
    assert verify(storage, repair=False) == (2, [])


def test_damaged_shard_is_named_and_set_aside(storage: LocalStorage) -> None:
    good, bad = store(storage, 2)
    content = bytearray(storage.path(bad).read_bytes())
    content[600] ^= 4
    storage.path(bad).write_bytes(content)
    assert verify(storage, repair=False)[1] == verify(storage, repair=True)[1] != []
    assert [name for name, _ in shards(storage, "latents")] == [good]
    assert storage.size(f"{bad}.damaged") is not None
    assert verify(storage, repair=False) == (1, [])


def test_shard_of_another_folder_is_found_and_made_again(storage: LocalStorage) -> None:
    [tar] = store(storage)
    [(_, receipt)] = shards(storage, "latents")
    for folder in ("latents/" + "1" * 32 + "/9x32x48", f"{COLLECTION.folder}/17x32x48"):
        for name in (receipt.name, tar):
            storage.publish(f"{folder}/{name.rpartition('/')[2]}", storage.path(name).read_bytes())
        _, [line] = verify(storage, repair=True)
        assert f"{folder}/{receipt.shard}.json: the receipt of {receipt.name}" in line
        assert verify(storage, repair=False) == (1, [])


def test_damage_of_every_kind_is_found_in_one_check(storage: LocalStorage) -> None:
    """One bit in a parquet file, deep JSON, huge numbers, a FIFO, a link to nowhere: each is one line."""
    tars = store(storage, 4)
    receipts = [receipt.name for _, receipt in shards(storage, "latents")]
    write_view(storage, View("clips", COLLECTION, Collection("prompts", "1" * 32), {}, ()))
    recipe = f"{COLLECTION.folder}/recipe.json"
    assignments = [f"assignments/{name}.json" for name in "pqrs"]
    for name, content in zip(
        assignments, (b"\0\0", b"[1]", sealed({"name": "p", "shards": []}), b"1e999"), strict=True
    ):
        storage.publish(name, content)
    storage.publish("assignments/good.json", sealed({"name": "assignments/good.json", "shards": []}))
    storage.publish(recipe, b"[" * 100_000, replace=True)
    storage.publish(tars[0], b"torn", replace=True)
    storage.publish(receipts[1], b"{}", replace=True)
    for tar in tars[2:]:
        storage.path(tar).unlink()
    storage.path(tars[2]).symlink_to("nowhere")
    os.mkfifo(storage.path(tars[3]))
    table = bytearray(storage.path("datasets/clips.parquet").read_bytes())
    for position in (5, len(table) // 2, len(table) - 9):
        flipped = bytearray(table)
        flipped[position] ^= 1
        storage.publish("datasets/clips.parquet", bytes(flipped), replace=True)
        lines = verify(storage, repair=False)[1]
        assert any("datasets/clips" in line and "\n" not in line for line in lines), position
    names = [recipe, tars[0], receipts[1], tars[2], tars[3], *assignments, "datasets/clips"]
    checked, lines = verify(storage, repair=True)
    assert checked == 4 and len(lines) == len(names)
    assert all(any(name in line for line in lines) for name in names)
    assert verify(storage, repair=False) == (0, [])
    assert storage.size("datasets/clips.parquet") is None and storage.size("assignments/good.json")


def test_view_with_a_changed_table_or_name_is_found(storage: LocalStorage) -> None:
    view = View("clips", COLLECTION, Collection("prompts", "1" * 32), {"": key_of("")}, ())
    write_view(storage, view)
    for suffix in ("json", "parquet"):
        storage.publish(f"datasets/other.{suffix}", storage.path(f"datasets/clips.{suffix}").read_bytes())
    _, [line] = verify(storage, repair=False)
    assert "datasets/other" in line

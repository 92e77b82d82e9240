"""`precog cache verify`: every damaged file is named, nothing ends the check, and repair sets files aside."""

import errno
import os
import random
from typing import Any

import pytest

from shared.cache.collection import Collection, collection_for, shards, write_recipe
from shared.cache.storage import LocalStorage
from shared.cache.verify import check_shard, verify
from shared.cache.view import View, read_table_name, read_view, write_view
from shared.errors import CacheError
from shared.fingerprint import Json, key_of, sealed
from tests.shared.cache.samples import COLLECTION, RECIPE, store


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


def test_shard_of_another_folder_is_found_and_made_again(storage: LocalStorage) -> None:
    [tar] = store(storage)
    [(_, receipt)] = shards(storage, "latents")
    for folder in ("latents/" + "1" * 32 + "/9x32x48", f"{COLLECTION.folder}/17x32x48"):
        for name in (receipt.name, tar):
            storage.publish(f"{folder}/{name.rpartition('/')[2]}", storage.path(name).read_bytes())
        write_recipe(storage, COLLECTION, RECIPE)
        _, lines = verify(storage, repair=True)
        assert f"{folder}/{receipt.shard}.json: the receipt of {receipt.name}" in lines[0]
        assert verify(storage, repair=False) == (1, [])


def test_damage_of_every_kind_is_found_in_one_check(storage: LocalStorage) -> None:
    """One bit in a parquet file, deep JSON, huge numbers, missing tars: each is one line."""
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
    storage.publish("made_by/x/deep.json", b"[" * 100_000)  # not even a `CacheError`
    storage.publish(recipe, b"[" * 100_000, replace=True)
    storage.publish(tars[0], b"torn", replace=True)
    storage.publish(receipts[1], b"{}", replace=True)
    for tar in tars[2:]:
        storage.path(tar).unlink()
    table_name = read_table_name(storage, "datasets/clips.json")
    table = bytearray(storage.path(table_name).read_bytes())
    for position in (5, len(table) // 2, len(table) - 9):
        flipped = bytearray(table)
        flipped[position] ^= 1
        storage.publish(table_name, bytes(flipped), replace=True)
        lines = verify(storage, repair=False)[1]
        assert any("datasets/clips" in line and "\n" not in line for line in lines), position
    names = [recipe, tars[0], receipts[1], tars[2], tars[3], *assignments, "datasets/clips", "made_by/x/deep"]
    checked, lines = verify(storage, repair=True)
    assert checked == 4 and len(lines) == len(names)
    assert all(any(name in line for line in lines) for name in names)
    assert verify(storage, repair=False) == (0, [])
    assert storage.size(table_name) is None and storage.size("assignments/good.json")


def test_fifo_in_place_of_a_file_is_damage(storage: LocalStorage) -> None:
    [tar] = store(storage)
    [(_, receipt)] = shards(storage, "latents")
    for name in (tar, receipt.name, f"{COLLECTION.folder}/recipe.json"):
        path = storage.path(name)
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        _, [line] = verify(storage, repair=False)
        assert line == f"{path}: cannot be {'opened' if name == tar else 'read'} (not a regular file)"
        path.unlink()
        path.write_bytes(content)


def test_view_under_another_name_is_set_aside_alone(storage: LocalStorage) -> None:
    write_view(storage, View("clips", COLLECTION, Collection("prompts", "1" * 32), {"": key_of("")}, ()))
    storage.publish("datasets/other.json", storage.path("datasets/clips.json").read_bytes())
    _, [line] = verify(storage, repair=True)
    assert "datasets/other" in line and read_view(storage, "clips").name == "clips"


def test_missing_recipe_is_named_and_another_format_left_alone(storage: LocalStorage) -> None:
    store(storage)
    other: dict[str, Json] = {"format": 3, "kind": "latents"}
    write_recipe(storage, collection_for("latents", other), other)
    storage.publish(f"{collection_for('latents', other).folder}/9x32x48/{'0' * 32}.json", b"{}")
    assert verify(storage, repair=True) == (1, [])
    storage.publish("made_by/x/y.json", b"{}")
    storage.path(f"{COLLECTION.folder}/recipe.json").unlink()
    _, [missing, made_by] = verify(storage, repair=True)
    assert "recipe.json: cannot be read (No such file" in missing and "made_by/x/y.json" in made_by
    write_recipe(storage, COLLECTION, RECIPE)
    assert verify(storage, repair=False) == (1, [])


def test_flipped_format_is_damage_and_no_other_format(storage: LocalStorage) -> None:
    recipe: dict[str, Json] = {"format": 2, "kind": "latents"}
    collection = collection_for("latents", recipe)
    write_recipe(storage, collection, recipe)
    name = f"{collection.folder}/recipe.json"
    storage.publish(name, storage.path(name).read_bytes().replace(b"2", b"3"), replace=True)
    _, [line] = verify(storage, repair=False)
    assert f"{name}: damaged" in line


def test_folder_without_permission_is_named_and_the_rest_checked(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.publish("assignments/p.json", b"{}")
    list_folder = os.scandir

    def scandir(path: str) -> Any:
        if path.endswith("latents"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", scandir)
    _, [latents, assignment] = verify(storage, repair=False)
    assert latents.endswith("latents: cannot be listed (Permission denied); check its permissions")
    assert "assignments/p.json: damaged" in assignment

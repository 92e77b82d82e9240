"""Collections: listed and read once, sizes checked, samples compared with their hashes."""

import pytest
import torch

from shared.cache.collection import (
    OPEN_SHARDS,
    Collection,
    SampleReader,
    collections,
    read_recipe,
    shards,
    write_recipe,
)
from shared.cache.index import read_samples
from shared.cache.shard import OpenShard, Receipt
from shared.cache.storage import LocalStorage, Storage
from shared.errors import CacheError
from tests.corpus import count_storage_calls
from tests.shared.cache.samples import COLLECTION, RECIPE, make_samples, store


def test_shards_are_listed_once_and_receipts_read_once(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    store(storage, 5)
    calls = count_storage_calls(monkeypatch)
    found = [receipt.name for receipt in read_samples(storage, COLLECTION.folder).receipts]
    assert len(found) == 5
    assert calls == {("files", COLLECTION.folder): 1} | {("read", name): 1 for name in found}
    calls.clear()
    assert [
        receipt.name for receipt in read_samples(storage, COLLECTION.folder, frozenset(found[1:])).receipts
    ] == found[:1]
    assert calls == {("files", COLLECTION.folder): 1, ("read", found[0]): 1}


def test_tar_without_receipt_does_not_exist(storage: LocalStorage) -> None:
    [tar] = store(storage)
    [(_, receipt)] = shards(storage, "latents")
    storage.path(receipt.name).unlink()
    assert storage.size(tar) and shards(storage, "latents") == []


def test_truncated_or_missing_tar_is_refused(storage: LocalStorage) -> None:
    [tar] = store(storage)
    path = storage.path(tar)
    content = path.read_bytes()
    for size in (0, 1, 512, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(CacheError, match=f"{tar}: {size} bytes, expected {len(content)}; run `precog cache verify"):
            shards(storage, "latents")
    path.unlink()
    with pytest.raises(CacheError, match=f"{tar}: not found; run `precog cache verify"):
        shards(storage, "latents")


def test_tar_that_changes_its_size_after_listing_is_refused(storage: LocalStorage) -> None:
    [tar] = store(storage)
    [(_, receipt)] = shards(storage, "latents")
    content = storage.path(tar).read_bytes()
    for other in (content[:-512], content + bytes(512)):
        storage.publish(tar, other, replace=True)
        with pytest.raises(CacheError, match=f"{tar}: {len(other)} bytes, expected {len(content)}"):
            OpenShard(storage, receipt)


def test_tar_that_the_listing_missed_is_looked_up(storage: LocalStorage) -> None:
    """A folder that changes while it is listed may show the receipt without its tar."""
    [tar] = store(storage)

    class Older(LocalStorage):
        def files(self, folder: str) -> dict[str, int]:
            return {name: size for name, size in super().files(folder).items() if name != tar}

    assert [name for name, _ in shards(Older(str(storage.root)), "latents")] == [tar]


def test_recipe_is_written_once_and_checked(storage: LocalStorage) -> None:
    write_recipe(storage, COLLECTION, RECIPE)
    assert read_recipe(storage, COLLECTION) == RECIPE and collections(storage) == [COLLECTION]
    for content in (b"{}", b"[" * 100_000, b"\xff"):
        storage.publish(f"{COLLECTION.folder}/recipe.json", content, replace=True)
        with pytest.raises(CacheError, match=r"recipe\.json: damaged .*; run `precog cache verify --repair`"):
            read_recipe(storage, COLLECTION)


def test_sample_is_compared_with_its_hash_at_every_read(storage: LocalStorage) -> None:
    [tar] = store(storage)
    [(_, receipt)] = shards(storage, "latents")
    whole = storage.path(tar).read_bytes()
    first, second = receipt.samples
    expected = {sample.key: sample for sample in make_samples(2)}[first.key].tensors["moments"]
    for limit in (float("inf"), 0):
        storage.path(tar).write_bytes(whole)
        reader = SampleReader(storage, COLLECTION, whole_up_to_bytes=limit)
        reader.read(second.key)
        with storage.path(tar).open("r+b") as file:  # which the reader may keep open
            file.seek(second.offset + second.length - 1)
            file.write(bytes([whole[second.offset + second.length - 1] ^ 1]))
        assert torch.equal(reader.read(first.key)["moments"], expected)
        with pytest.raises(CacheError, match=f"{tar}: sample {second.key} is damaged; run `precog cache verify"):
            reader.read(second.key)


def test_reader_counts_wanted_shards_and_keeps_few_open(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    tars = store(storage, OPEN_SHARDS + 1)
    keys = {tar: receipt.samples[0].key for tar, receipt in shards(storage, "latents")}
    wanted = SampleReader(storage, COLLECTION, [keys[tars[0]]])
    assert list(wanted.shard_bytes) == [tars[0]] and wanted.copies_bytes == storage.size(tars[0])
    opened: list[str] = []

    class Counted(OpenShard):
        def __init__(self, storage: Storage, receipt: Receipt) -> None:
            opened.append(receipt.tar)
            super().__init__(storage, receipt)

    monkeypatch.setattr("shared.cache.collection.OpenShard", Counted)
    reader = SampleReader(storage, COLLECTION)
    for tar in (*tars[:-1], tars[0], tars[-1], tars[0]):
        reader.read(keys[tar])
    assert opened == tars


def test_sample_that_is_not_stored_is_named(storage: LocalStorage) -> None:
    store(storage)
    reader = SampleReader(storage, COLLECTION)
    assert "0" * 32 not in reader
    with pytest.raises(CacheError, match=r"sample 0{32} is not stored; run `precog precompute`"):
        reader.read("0" * 32)
    assert SampleReader(storage, Collection("prompts", "1" * 32)).shard_bytes == {}

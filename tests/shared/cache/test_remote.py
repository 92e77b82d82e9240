"""A cache behind fsspec: in memory, and over the S3 protocol from a server on loopback."""

import hashlib
import os
import random
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from bench.shards import write_shard
from shared.cache.collection import SampleReader, shards
from shared.cache.garbage import find_garbage, remove_garbage
from shared.cache.index import INDEX
from shared.cache.remote import KNOWN, RemoteStorage
from shared.cache.shard import Sample
from shared.cache.storage import LocalStorage, Storage, open_storage
from shared.cache.transfer import find_transfer, transfer
from shared.cache.verify import verify
from shared.cache.view import View
from shared.errors import CacheError, UsageError
from shared.fingerprint import key_of
from tests.corpus import config_for, run, stored_files, write_corpus
from tests.faults.writer import ended, in_child
from tests.shared.cache.samples import COLLECTION, FOLDER, make_samples, pack_shard, read_whole, store, store_view


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[RemoteStorage]:
    storage = open_storage("memory://bucket/cache", local_folder=tmp_path / "local")
    assert isinstance(storage, RemoteStorage)
    yield storage
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def bucket(server: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make an empty bucket on a server on loopback and return its name."""
    s3fs: Any = pytest.importorskip("s3fs")

    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server}",
    }.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{secrets.token_hex(4)}"
    s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False).mkdir(name)
    return name


def fill(storage: Storage, count: int = 2) -> list[Sample]:
    """Store shards of two samples and return these."""
    store(storage, count)
    return [sample for seed in range(count) for sample in make_samples(2, seed)]


def check(storage: Storage, samples: list[Sample]) -> None:
    """Read each sample twice and compare it."""
    reader = SampleReader(storage, COLLECTION)
    for sample in samples:
        assert torch.equal(reader.read(sample.key)["moments"], sample.tensors["moments"])
        reader.read(sample.key)


def test_damage_is_found_and_set_aside(memory: RemoteStorage, tmp_path: Path) -> None:
    samples = fill(memory)
    check(memory, samples)
    tar = shards(memory, "latents")[0][0]
    content = bytearray(memory.read(tar, limit_bytes=10**6))
    content[1500] ^= 1
    memory.publish(tar, bytes(content), replace=True)
    fresh = open_storage("memory://bucket/cache", local_folder=tmp_path / "fresh")
    checked, damaged = verify(fresh, repair=True)
    assert checked == 2 and len(damaged) == 1 and tar in damaged[0]
    assert len(shards(fresh, "latents")) == 1 and fresh.size(f"{tar}.damaged")


def test_receipts_are_fetched_once_per_process_unless_replaced(
    memory: RemoteStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(memory, 3)
    KNOWN.clear()
    fetched: list[str] = []
    fetch = MemoryFileSystem.cat_file

    def counted(driver: Any, name: str, **options: Any) -> Any:
        fetched.append(name)
        return fetch(driver, name, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    found = shards(memory, COLLECTION.folder)
    assert len(fetched) == 3 and shards(open_storage("memory://bucket/cache"), COLLECTION.folder) == found
    assert len(fetched) == 3
    name = found[0][1].name
    content = memory.read(name, limit_bytes=10**6)
    for _ in range(2):
        memory.publish(name, content, replace=True)
        assert shards(memory, COLLECTION.folder) == found
    assert len(fetched) == 5
    memory.publish(name, b"{}", replace=True)
    assert memory.read(name, limit_bytes=10) == b"{}"


def test_torn_upload_has_no_receipt_and_is_repeated(memory: RemoteStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = make_samples()
    content, receipt = pack_shard(FOLDER, samples)

    def torn(driver: MemoryFileSystem, _path: str, name: str, **_: object) -> None:
        driver.pipe_file(name, content[:1000])
        raise OSError("connection lost")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", torn)
        with pytest.raises(CacheError, match=rf"^{memory}/{receipt.tar}: cannot be written .connection lost.; run"):
            write_shard(memory, FOLDER, samples)
    assert shards(memory, "latents") == [] and memory.size(receipt.tar) == 1000
    assert write_shard(memory, FOLDER, samples)[0] == receipt
    assert memory.read(receipt.tar, limit_bytes=len(content)) == content


def test_least_recently_used_and_abandoned_copies_are_deleted_first(tmp_path: Path) -> None:
    local = tmp_path / "local"
    storage = open_storage("memory://bucket/recent", local_cache_gib=250 / 2**30, local_folder=local)
    contents = [letter * 100 for letter in (b"a", b"b", b"c")]
    names = [f"{hashlib.sha256(content).hexdigest()}.tar" for content in contents]
    for name, content in zip(names, contents, strict=True):
        storage.publish(name, content)
    first, second = (storage.local_tar(name, 100) for name in names[:2])
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    abandoned, under_way = local / ".tmp-0123456789abcdef", local / ".tmp-fedcba9876543210"
    for path in (abandoned, under_way):
        path.write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    assert storage.local_tar(names[0], 100) == first
    third = storage.local_tar(names[2], 100)
    assert first.is_file() and third.is_file() and not second.exists()
    assert under_way.exists() and not abandoned.exists()


def test_first_writer_wins_with_a_driver_that_overwrites(
    memory: RemoteStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = MemoryFileSystem.pipe_file

    def only_overwrites(driver: Any, path: str, content: bytes, mode: str = "overwrite") -> None:
        if mode == "create":
            raise NotImplementedError
        pipe(driver, path, content)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", only_overwrites)
    assert memory.publish("a.json", b"first") and not memory.publish("a.json", b"second")
    assert memory.read("a.json", limit_bytes=10) == b"first"


def test_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)  # another test may have used it
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UsageError, match=r'no driver for s3:// is installed; run `make setup EXTRAS="s3"`'):
        open_storage("s3://bucket/cache")


def test_copy_that_is_torn_or_damaged_is_refused_and_not_kept(
    memory: RemoteStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt = write_shard(memory, FOLDER, make_samples(1))[0]
    content = memory.read(receipt.tar, limit_bytes=10**6)

    def torn(_driver: object, _name: str, path: str, **_: object) -> None:
        Path(path).write_bytes(content[:100])
        raise OSError("connection lost")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", torn)
        with pytest.raises(CacheError, match=f"{receipt.tar}: cannot be fetched .connection lost.; run the same"):
            memory.local_tar(receipt.tar, receipt.size)
    memory.publish(receipt.tar, content[:-1] + b"x", replace=True)
    with pytest.raises(CacheError, match=f"{receipt.tar}: damaged; run `precog cache verify --repair`"):
        memory.local_tar(receipt.tar, receipt.size)
    assert list((tmp_path / "local").iterdir()) == []
    memory.publish(receipt.tar, content, replace=True)
    assert memory.local_tar(receipt.tar, receipt.size).read_bytes() == content


def test_s3_reads_back_and_the_first_writer_wins(bucket: str, tmp_path: Path) -> None:
    storage = open_storage(f"s3://{bucket}/cache", local_folder=tmp_path)
    check(storage, fill(storage))
    assert storage.publish("a.json", b"first") and not storage.publish("a.json", b"second")
    assert storage.read("a.json", limit_bytes=10) == b"first" and storage.size("nowhere") is None
    storage.set_aside("a.json")
    assert storage.size("a.json.damaged") == 5 and storage.size("a.json") is None


def test_stage_1_stores_the_same_bytes_in_a_bucket_and_on_disk(
    memory: RemoteStorage, pipeline: Path, tmp_path: Path
) -> None:
    root = write_corpus(tmp_path / "clips", 3)
    run(config_for(pipeline, root, tmp_path / "disk"))
    assert run(config_for(pipeline, root, str(memory))).latents.made == 3
    assert run(config_for(pipeline, root, str(memory))).latents.made == 0
    names = [name for folder in ("latents", "prompts", "datasets") for name in memory.files(folder)]
    names = [name for name in names if not name.endswith(INDEX)]
    assert {name: memory.read(name, limit_bytes=10**7) for name in names} == stored_files(tmp_path / "disk")


def test_push_and_pull_give_the_same_bytes_and_gc_deletes_objects(memory: RemoteStorage, tmp_path: Path) -> None:
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    store(open_storage(here), 2)
    store_view(open_storage(here), "clips", [key_of([0, 0]), key_of([1, 1])])
    copied(here, str(memory), tmp_path / "local")
    copied(str(memory), there, tmp_path / "local")
    assert stored_files(Path(there)) == stored_files(Path(here)) and find_garbage(memory, 3600).files == {}
    memory.remove("datasets/clips.json")
    garbage = find_garbage(memory, -1)
    remove_garbage(memory, garbage)
    assert len(garbage.files) == 11 and all(not memory.files(folder) for folder in ("latents", "prompts", "datasets"))


def copied(source: str, target: str, local: Path) -> None:
    """Copy what the target lacks."""
    here, there = (open_storage(cache, local_folder=local) for cache in (source, target))
    found = find_transfer(here, there)
    transfer(here, there, found, found.views)


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_pushes_to_s3_killed_at_random_moments_lose_nothing(bucket: str, tmp_path: Path) -> None:
    draws, here, url, kills = random.Random(0), LocalStorage(str(tmp_path / "here")), f"s3://{bucket}/cache", 0
    store(here, 6)
    trial, views = 0, list[View]()
    while kills < 20:
        view = store_view(here, f"v{trial}", [key_of([trial % 6, 0])], [f"text {trial}"])
        child = in_child(partial(copied, str(here.root), url, tmp_path / "child"))
        time.sleep(0.1 + 0.5 * draws.random())
        os.kill(child, signal.SIGKILL)
        kills += ended(child) != 0
        storage = open_storage(url, local_folder=tmp_path / str(trial))
        for done in views:
            read_whole(storage, done)
        assert verify(storage, repair=False)[1] == []
        copied(str(here.root), url, tmp_path / "local")
        views.append(view)
        read_whole(storage, view)
        trial += 1

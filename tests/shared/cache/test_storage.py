"""Local storage: files are whole or absent, the first writer wins, and every error is one line."""

import errno
import multiprocessing
import os
import stat
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from bench.shards import write_shard
from shared.atomic_files import TEMPORARY
from shared.cache.collection import shards
from shared.cache.shard import Sample, shard_name
from shared.cache.storage import LocalStorage, Storage, open_storage
from shared.cache.verify import check_shard
from shared.errors import CacheError, UsageError
from shared.fingerprint import key_of


@pytest.fixture(params=["folder", "memory"])
def any_storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """Open a cache in a folder, and one behind fsspec."""
    yield open_storage(
        str(tmp_path) if request.param == "folder" else "memory://cache", local_folder=tmp_path / "local"
    )
    MemoryFileSystem.store.clear()


def test_first_writer_wins(any_storage: Storage) -> None:
    assert any_storage.publish("a/b.json", b"first")
    assert not any_storage.publish("a/b.json", b"second")
    assert any_storage.read("a/b.json", limit_bytes=100) == b"first"
    assert any_storage.publish("a/b.json", b"third", replace=True)
    assert any_storage.read("a/b.json", limit_bytes=100) == b"third"
    assert any_storage.files("a") == {"a/b.json": 5} and any_storage.files("nowhere") == {}
    any_storage.set_aside("a/b.json")
    assert any_storage.size("a/b.json.damaged") == 5 and any_storage.size("a/b.json") is None
    any_storage.remove("a/b.json.damaged")
    assert any_storage.files("a") == {}


def test_missing_oversized_or_short_file_is_named(any_storage: Storage) -> None:
    any_storage.publish("a.json", b"0123456789x")
    assert any_storage.read_part("a.json", 3, 7) == b"3456789" and any_storage.size("a.json") == 11
    with pytest.raises(CacheError, match=f"^{any_storage}/gone.json: cannot be read"):
        any_storage.read("gone.json", limit_bytes=10)
    with pytest.raises(CacheError, match=f"^{any_storage}/a.json: more than the limit of 10 bytes"):
        any_storage.read("a.json", limit_bytes=10)
    with pytest.raises(CacheError, match=f"^{any_storage}/a.json: ends before byte 12"):
        any_storage.read_part("a.json", 3, 9)


def test_files_are_sorted_and_leave_out_temporaries(storage: LocalStorage) -> None:
    for name in ("a/z.json", "a/b/y.json", "a/b/y.tar", f"a/{TEMPORARY}x.json", "a/w.json.damaged", "b/v.json"):
        storage.publish(name, b"")
    found = storage.files("a")
    assert list(found) == ["a/b/y.json", "a/b/y.tar", "a/w.json.damaged", "a/z.json"] and set(found.values()) == {0}


@pytest.mark.parametrize(("number", "fine"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_folder_that_cannot_be_synced_is_an_error_if_supported(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, number: int, fine: bool
) -> None:
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    storage.path("a").mkdir(parents=True)
    monkeypatch.setattr(os, "fsync", fsync)
    if fine:
        assert storage.publish("a/new.tar", b"x")
        return
    with pytest.raises(CacheError, match=r"a/new\.tar: cannot be written \(Input/output error\)"):
        storage.publish("a/new.tar", b"x")


@pytest.mark.parametrize(
    ("call", "number", "message"),
    [
        ("fsync", errno.ENOSPC, "the disk is full .*; free some space and run the same command again"),
        ("link", errno.EDQUOT, "the disk is full .*; free some space and run the same command again"),
        ("fsync", errno.EIO, r"a/new.tar: cannot be written \(Input/output error\)"),
    ],
)
def test_failed_write_is_one_line_and_leaves_nothing(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, call: str, number: int, message: str
) -> None:
    def failed(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    storage.publish("a/there.json", b"before")
    with monkeypatch.context() as patched:
        patched.setattr(os, call, failed)
        with pytest.raises(CacheError, match=message):
            storage.publish("a/new.tar", b"x" * 1000)
    assert [path.name for path in storage.path("a").iterdir()] == ["there.json"]
    assert storage.publish("a/new.tar", b"x" * 1000)


def test_first_writer_wins_without_hard_links(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert storage.publish("a.json", b"first")
    assert not storage.publish("a.json", b"second")
    assert storage.read("a.json", limit_bytes=10) == b"first"


def race(root: str, number: int, rounds: int, barrier: Barrier) -> None:
    storage = LocalStorage(root)
    for turn in range(rounds):
        barrier.wait()
        # Each writer has other facts, so other bytes for the same keys.
        write_shard(storage, "latents/r/b", [Sample(key_of(turn), {}, {"writer": number, "pad": "x" * 20_000})])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_racing_writers_leave_one_consistent_shard(tmp_path: Path) -> None:
    """Three writers, bytes that differ, no locks: receipt and tar belong together."""
    context = multiprocessing.get_context("fork")
    rounds, barrier = 12, context.Barrier(3)
    writers = [context.Process(target=race, args=(str(tmp_path), n, rounds, barrier)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    storage = LocalStorage(str(tmp_path))
    found = shards(storage, "latents")
    assert len(found) == rounds
    for _, receipt in found:
        check_shard(storage, receipt.name)
    assert {receipt.shard for _, receipt in found} == {shard_name([key_of(turn)]) for turn in range(rounds)}
    assert list(tmp_path.rglob(f"{TEMPORARY}*")) == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://host/cache", "cannot be written; give a folder or a plain URL"),
        ("simplecache::s3://bucket", "give a folder or a plain URL"),
        ("nonsense://x", "nonsense"),
        ("file://relative", "write file:///folder"),
    ],
)
def test_unsuitable_cache_says_what_to_give(url: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_storage(url)


def test_file_urls_and_folders_are_the_same_cache(tmp_path: Path) -> None:
    open_storage(f"file://{tmp_path}").publish("a.json", b"x")
    assert open_storage(str(tmp_path)).size("a.json") == 1
    assert (open_storage(str(tmp_path / "not" / "yet")).free_bytes() or 0) > 0

"""Local storage: files are whole or absent, the first writer wins, and every error is one line."""

import errno
import multiprocessing
import os
import stat
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from bench.shards import write_shard
from shared.atomic_files import TEMPORARY
from shared.cache.collection import shards
from shared.cache.shard import Sample, shard_name
from shared.cache.storage import LocalStorage, open_storage
from shared.cache.verify import check_shard
from shared.errors import CacheError, UsageError
from shared.fingerprint import key_of


def test_first_writer_wins(storage: LocalStorage) -> None:
    assert storage.publish("a/b.json", b"first")
    assert not storage.publish("a/b.json", b"second")
    assert storage.read("a/b.json", limit_bytes=100) == b"first"
    assert storage.publish("a/b.json", b"third", replace=True)
    assert storage.read("a/b.json", limit_bytes=100) == b"third"
    assert storage.files("a") == {"a/b.json": 5}


def test_files_are_sorted_and_leave_out_temporaries(storage: LocalStorage) -> None:
    for name in ("a/z.json", "a/b/y.json", "a/b/y.tar", f"a/{TEMPORARY}x.json", "a/w.json.damaged", "b/v.json"):
        storage.publish(name, b"")
    os.mkfifo(storage.path("a/fifo.json"))
    storage.path("a/link.json").symlink_to("nowhere")
    found = storage.files("a")
    assert list(found) == ["a/b/y.json", "a/b/y.tar", "a/w.json.damaged", "a/z.json"] and set(found.values()) == {0}
    assert storage.files("nowhere") == {}


def test_missing_or_oversized_file_is_named(storage: LocalStorage) -> None:
    with pytest.raises(CacheError, match=r"cache/a\.json: cannot be read \(No such file or directory\)"):
        storage.read("a.json", limit_bytes=10)
    storage.publish("a.json", b"x" * 11)
    with pytest.raises(CacheError, match=r"cache/a\.json: more than the limit of 10 bytes"):
        storage.read("a.json", limit_bytes=10)
    assert storage.size("a.json") == 11 and storage.size("b.json") is None and storage.size("") is None


def test_fifo_is_refused_even_while_somebody_writes_to_it(storage: LocalStorage) -> None:
    storage.root.mkdir()
    os.mkfifo(storage.path("a.json"))
    writer = os.open(storage.path("a.json"), os.O_RDWR)
    os.write(writer, b"{}")
    with pytest.raises(CacheError, match=r"a\.json: cannot be read \(not a regular file\)"):
        storage.read("a.json", limit_bytes=10)
    os.close(writer)


def test_part_beyond_the_end_is_refused(storage: LocalStorage) -> None:
    storage.publish("a.tar", b"0123456789")
    assert storage.read_part("a.tar", 3, 7) == b"3456789"
    for offset, length in ((3, 8), (10, 1), (20, 1)):
        with pytest.raises(CacheError, match=rf"cache/a\.tar: ends before byte {offset + length}"):
            storage.read_part("a.tar", offset, length)


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


def test_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"file/cache/a/b.json: cannot be written \(File exists: .*/file\)"):
        LocalStorage(str(tmp_path / "file" / "cache")).publish("a/b.json", b"1")


@pytest.mark.parametrize(
    ("call", "number", "message"),
    [
        ("fsync", errno.ENOSPC, "the disk is full; free some space and run the same command again"),
        ("link", errno.EDQUOT, "the disk is full; free some space and run the same command again"),
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


def test_read_only_file_system_is_one_line(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.publish("a/old.tar", b"x")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("open", "unlink", "replace"):
        monkeypatch.setattr(Path, name, refuse)
    with pytest.raises(CacheError, match=r"a/new.tar: cannot be written \(Read-only file system\)"):
        storage.publish("a/new.tar", b"x")
    with pytest.raises(CacheError, match=r"a/old.tar: cannot be renamed \(Read-only file system\)"):
        storage.set_aside("a/old.tar")


def test_first_writer_wins_without_hard_links(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert storage.publish("a.json", b"first")
    assert not storage.publish("a.json", b"second")
    assert storage.read("a.json", limit_bytes=10) == b"first"


def test_temporaries_of_other_writers_stay(storage: LocalStorage) -> None:
    theirs = storage.path(f"a/{TEMPORARY}0123-x.tar")
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"in the making")
    storage.publish("a/x.tar", b"mine")
    assert theirs.read_bytes() == b"in the making"


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

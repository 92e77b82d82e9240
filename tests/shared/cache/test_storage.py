"""Publishing: whole or not at all, first writer wins, and a full disk is one clear line."""

import errno
import multiprocessing
import os
import stat
from pathlib import Path

import pytest

from shared.cache.collection import shards
from shared.cache.shard import Sample, read_receipt, shard_name, write_shard
from shared.cache.storage import TEMPORARY, LocalStorage, open_storage
from shared.cache.verify import check_shard
from shared.errors import CacheError, UsageError
from shared.fingerprint import key_of


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path / "cache"))


def test_the_first_writer_wins_and_the_second_is_told(storage):
    assert storage.publish("a/b.json", b"first")
    assert not storage.publish("a/b.json", b"second")
    assert storage.read("a/b.json", limit_bytes=100) == b"first"
    assert storage.publish("a/b.json", b"third", replace=True)
    assert storage.read("a/b.json", limit_bytes=100) == b"third"
    assert storage.names("a", ".json") == ["a/b.json"]


def test_names_are_sorted_recursive_and_leave_out_files_in_the_making(storage):
    for name in ("a/z.json", "a/b/y.json", "a/b/y.tar", f"a/{TEMPORARY}x.json", "a/w.json.damaged", "b/v.json"):
        storage.publish(name, b"")
    assert storage.names("a", ".json") == ["a/b/y.json", "a/z.json"]
    assert storage.names("nowhere", ".json") == []


def test_a_missing_or_oversized_file_is_named(storage):
    with pytest.raises(CacheError, match=r"cache/a\.json: cannot be read \(No such file or directory\)"):
        storage.read("a.json", limit_bytes=10)
    storage.publish("a.json", b"x" * 11)
    with pytest.raises(CacheError, match=r"cache/a\.json: larger than 10 bytes"):
        storage.read("a.json", limit_bytes=10)
    assert storage.size("a.json") == 11 and storage.size("b.json") is None


def test_a_part_that_the_file_does_not_have_whole_is_refused(storage):
    storage.publish("a.tar", b"0123456789")
    assert storage.read_part("a.tar", 3, 7) == b"3456789"
    for offset, length in ((3, 8), (10, 1), (20, 1)):
        with pytest.raises(CacheError, match=rf"cache/a\.tar: ends before byte {offset + length}"):
            storage.read_part("a.tar", offset, length)


@pytest.mark.parametrize(("number", "fine"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_folder_whose_entries_may_be_lost_is_no_success_but_some_file_systems_cannot_say(
    storage, monkeypatch, number, fine
):
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


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"file/cache/a/b.json: cannot be written \(File exists: .*/file\)"):
        LocalStorage(tmp_path / "file" / "cache").publish("a/b.json", b"1")


@pytest.mark.parametrize("call", ["write", "fsync", "link"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_cache_error_and_leaves_nothing(storage, monkeypatch, call, number):
    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    storage.publish("a/there.json", b"before")
    if call == "write":
        resource_full(storage)
    else:
        monkeypatch.setattr(os, call, full)
        with pytest.raises(CacheError, match="the disk is full; free some space and run the same command again"):
            storage.publish("a/new.tar", b"x" * 1000)
    monkeypatch.undo()
    assert [path.name for path in storage.path("a").iterdir()] == ["there.json"]
    assert storage.publish("a/new.tar", b"x" * 1000)


def resource_full(storage: LocalStorage) -> None:
    """The kernel itself refuses the write: a real file system without room."""
    storage.path("a").joinpath("full").symlink_to("/dev/full")
    try:
        with pytest.raises(OSError, match="No space left"), storage.path("a/full").open("wb", buffering=0) as stream:
            stream.write(b"x")
    finally:
        storage.path("a/full").unlink()


def test_another_error_is_one_line_and_leaves_nothing(storage, monkeypatch):
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    storage.path("a").mkdir(parents=True)
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(CacheError, match=r"a/new.tar: cannot be written \(Input/output error\)"):
        storage.publish("a/new.tar", b"x")
    assert list(storage.path("a").iterdir()) == []


def test_a_file_system_that_is_read_only_is_one_line(storage, monkeypatch):
    storage.publish("a/old.tar", b"x")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("open", "unlink", "replace"):
        monkeypatch.setattr(Path, name, refuse)
    with pytest.raises(CacheError, match=r"a/new.tar: cannot be written \(Read-only file system\)"):
        storage.publish("a/new.tar", b"x")
    with pytest.raises(CacheError, match=r"a/old.tar: cannot be set aside \(Read-only file system\)"):
        storage.set_aside("a/old.tar")


def test_a_file_system_without_hard_links_still_lets_the_first_writer_win(storage, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert storage.publish("a.json", b"first")
    assert not storage.publish("a.json", b"second")
    assert storage.read("a.json", limit_bytes=10) == b"first"


def test_nobody_deletes_the_temporary_of_another(storage):
    theirs = storage.path(f"a/{TEMPORARY}0123-x.tar")
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"in the making")
    storage.publish("a/x.tar", b"mine")
    assert theirs.read_bytes() == b"in the making"


def _race(root: str, number: int, rounds: int, barrier: object) -> None:
    storage = LocalStorage(root)
    for turn in range(rounds):
        barrier.wait()  # type: ignore[attr-defined]
        # Other facts are other bytes under the same name, which only a broken encoder gives: the worst case.
        write_shard(storage, "latents/r/b", [Sample(key_of(turn), {}, {"writer": number, "pad": "x" * 20_000})])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_writers_that_race_leave_one_consistent_shard(tmp_path):
    """Three writers, bytes that differ, no locks: receipt and tar belong together."""
    context = multiprocessing.get_context("fork")
    rounds, barrier = 100, context.Barrier(3)
    writers = [context.Process(target=_race, args=(str(tmp_path), n, rounds, barrier)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    storage = LocalStorage(str(tmp_path))
    found = list(shards(storage, "latents"))
    assert len(found) == rounds
    for tar, receipt in found:
        name = tar.removesuffix(".tar") + ".json"
        check_shard(storage, name)
        assert receipt == read_receipt(storage, name)
    assert {receipt.shard for _, receipt in found} == {shard_name([key_of(turn)]) for turn in range(rounds)}
    assert list(tmp_path.rglob(f"{TEMPORARY}*")) == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://host/cache", "give a folder or a plain URL that can be written"),
        ("simplecache::s3://bucket", "give a folder or a plain URL"),
        ("nonsense://x", "nonsense"),
        ("file://relative", "write it as file:///folder"),
    ],
)
def test_a_cache_that_cannot_be_opened_says_what_would_do(url, message):
    with pytest.raises(UsageError, match=message):
        open_storage(url)


def test_file_urls_and_folders_are_the_same_cache(tmp_path):
    open_storage(f"file://{tmp_path}").publish("a.json", b"x")
    assert open_storage(str(tmp_path)).exists("a.json")
    assert (open_storage(str(tmp_path / "not" / "yet")).free_bytes() or 0) > 0

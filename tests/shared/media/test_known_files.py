"""Known files are found by their own mark only, kept only when asked, and never trusted when damaged."""

import os
import random
import sqlite3
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest

from precompute.report import Report
from shared.media import known_files
from shared.media.known_files import FILE, KnownFiles
from shared.media.picture import Look
from shared.media.probe import Probe, Probed, mark_of
from tests.corpus import config_for, run, write_corpus, write_video


class Run(Protocol):
    def __call__(self, *, remember_files: bool = False) -> Report: ...


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give this test a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "precog"


@pytest.fixture
def again(pipeline: Path, tmp_path: Path) -> Run:
    """Stage 1 on two clips."""
    root = write_corpus(tmp_path / "clips", 2)

    def run_again(*, remember_files: bool = False) -> Report:
        return run(config_for(pipeline, root, tmp_path / "cache", remember_files=remember_files))

    return run_again


def read_media(report: Report) -> bool:
    """Return True if a decoding process has read anything."""
    return report.seconds["decode"] > 0


def save(folder: Path, count: int, frames: int = 300) -> dict[Path, Probed]:
    """Write `count` files and save a probe of each."""
    known = KnownFiles(folder)
    saved = {}
    for number in range(count):
        path = folder / f"{number}.mp4"
        path.write_bytes(bytes(number))
        times = array("q", (index * 1_000_000 // 30 for index in range(frames)))
        mark = mark_of(path.stat())
        probe = Probe(f"{number:064}", mark, frames, 0, Look((48, 80)), "h264", "mp4", 0, 9, False, True)
        saved[path] = Probed(probe, times)
        known.add(saved[path])
    known.save()
    return saved


def found(folder: Path, saved: dict[Path, Probed]) -> list[Path]:
    """Return the paths that are found, each as it was saved."""
    known = KnownFiles(folder)
    answers = {path: known.find(path) for path in saved}
    known.save()
    assert all(answer in (None, saved[path]) for path, answer in answers.items())
    return [path for path, answer in answers.items() if answer]


def test_a_rerun_reads_no_media_when_asked_and_finds_the_same(again: Run, home: Path, tmp_path: Path) -> None:
    assert again().clips == 2 and not home.exists()
    assert read_media(again(remember_files=True)) and home.exists()
    view = (tmp_path / "cache/datasets/corpus.json").read_bytes()
    report = again(remember_files=True)
    assert not read_media(report) and report.clips == 2
    assert (tmp_path / "cache/datasets/corpus.json").read_bytes() == view
    assert read_media(again())


def test_an_edit_with_size_and_mtime_put_back_is_noticed(again: Run, tmp_path: Path) -> None:
    path = tmp_path / "clips/001.mp4"
    path.write_bytes(path.read_bytes() + bytes(10_000))  # room for any other video
    again(remember_files=True)
    before = path.stat()
    other = write_video(tmp_path / "other.mp4", 99).read_bytes()
    path.write_bytes(other.ljust(before.st_size, b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)
    assert again(remember_files=True).latents.made == 1


def test_probes_are_read_back_as_they_were_in_little_space(tmp_path: Path) -> None:
    saved = save(tmp_path, 20)
    assert found(tmp_path, saved) == list(saved)
    assert (tmp_path / FILE).stat().st_size < 20 * 2000


def test_a_long_variable_rate_is_read_back(tmp_path: Path) -> None:
    draws = random.Random(1)
    times = array("q", [0])
    for _ in range(20_000):
        times.append(times[-1] + draws.randrange(1, 60_000))
    (path, short), *_ = save(tmp_path, 1).items()
    long = Probed(replace(short.probe, num_frames=len(times)), times)
    known = KnownFiles(tmp_path)
    known.add(long)
    known.save()
    assert KnownFiles(tmp_path).find(path) == long


def test_a_changed_moved_or_missing_file_is_not_known(tmp_path: Path) -> None:
    (path, _), (other, _) = save(tmp_path, 2).items()
    path.write_bytes(b"changed")
    other.unlink()
    known = KnownFiles(tmp_path)
    assert known.find(path) is None and known.find(other) is None and known.find(tmp_path) is None


def test_a_damaged_database_gives_no_wrong_answer(tmp_path: Path) -> None:
    saved = save(tmp_path, 5)
    content = (tmp_path / FILE).read_bytes()
    draws = random.Random(1)
    answers = 0
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(draws.choice([1, 50])):
            damaged[draws.randrange(len(damaged))] ^= 1 << draws.randrange(8)
        (tmp_path / FILE).write_bytes(damaged[: draws.choice([len(damaged), draws.randrange(len(damaged))])])
        answers += len(found(tmp_path, saved))
    assert answers > 0


def test_a_damaged_database_is_started_afresh_with_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / FILE).write_bytes(b"[" * 30_000)
    saved = save(tmp_path, 3)
    assert capsys.readouterr().err.count("warning: precompute.remember_files") == 1
    assert found(tmp_path, saved) == list(saved)
    assert capsys.readouterr().err == ""


def test_probes_of_another_reader_are_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save(tmp_path, 1)
    monkeypatch.setattr(known_files, "READER", "2 av 99")
    assert found(tmp_path, saved) == []


def test_two_workers_keep_what_both_have_read(tmp_path: Path) -> None:
    first = save(tmp_path, 2)
    one, two = KnownFiles(tmp_path), KnownFiles(tmp_path)
    for known, path in zip((one, two), first, strict=True):
        path.touch()
        first[path] = replace(first[path], probe=replace(first[path].probe, mark=mark_of(path.stat())))
        known.add(first[path])
    one.save()
    two.save()
    assert found(tmp_path, first) == list(first)


def test_the_oldest_probes_go_when_there_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_files, "MAX_FILES", 3)
    saved = save(tmp_path, 8)
    assert found(tmp_path, saved) == list(saved)[-3:]


def test_a_database_that_cannot_be_used_costs_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    known = KnownFiles(tmp_path / "file" / "below")
    assert known.find(tmp_path) is None
    known.save()
    assert capsys.readouterr().err.count("warning: precompute.remember_files") == 1
    saved = save(tmp_path, 1)
    with sqlite3.connect(tmp_path / FILE, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        monkeypatch.setattr(known_files, "LOCKED_SECONDS", 0.1)
        assert found(tmp_path, saved) == []
        assert "database is locked" in capsys.readouterr().err
        other.execute("ROLLBACK")
    other.close()
    assert found(tmp_path, saved) == list(saved)

"""What files hold is remembered only when asked, found again only by the file's own mark, and never trusted damaged."""

import json
import os
import random
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from precompute.report import Report
from precompute.video import known_files as remembered
from precompute.video.known_files import FILE, Remembered
from precompute.video.probe import Probe, Probed, probe
from tests.corpus import config_for, run, write_corpus, write_video


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "precog"


@pytest.fixture
def again(pipeline: Path, tmp_path: Path) -> Any:
    """Runs stage 1 on three clips; `settings` go over [precompute]."""
    root = write_corpus(tmp_path / "clips", 3)
    return lambda **settings: run(config_for(pipeline, root, tmp_path / "cache", **settings))


def read_media(report: Report) -> bool:
    """Whether any child was given anything to read."""
    return report.seconds["decode"] > 0


def probed(number: int, frames: int = 300) -> Probed:
    times = array("q", (index * 1_000_000 // 30 for index in range(frames)))
    mark = (1, number, 2, 3, 4)
    return Probed(Probe(f"{number:064}", mark, frames, 0, 48, 80, 0, "h264", "mp4", "yuv420p", False, True), times)


def test_a_rerun_reads_no_media_when_asked_and_finds_the_same(again: Any, home: Path, tmp_path: Path) -> None:
    assert again().clips == 3 and not home.exists()
    assert read_media(again(remember_files=True)) and home.exists()
    view = (tmp_path / "cache/datasets/corpus.parquet").read_bytes()
    report = again(remember_files=True)
    assert not read_media(report) and report.clips == 3
    assert (tmp_path / "cache/datasets/corpus.parquet").read_bytes() == view
    assert read_media(again())


def swap(path: Path, seed: int) -> None:
    """Other pixels in a file of the same inode, size and time of change."""
    before = path.stat()
    other = write_video(path.with_suffix(".other.mp4"), seed)
    size = max(before.st_size, other.stat().st_size)
    path.write_bytes(other.read_bytes().ljust(size, b"\0")[:size])
    other.unlink()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def forge(home: Path, old: os.stat_result, path: Path) -> None:
    """Make the memory take the file as it is now for what it was."""
    memory = Remembered()
    found = memory.probed(remembered.mark_of(old))
    memory.add(replace(found, probe=replace(found.probe, mark=remembered.mark_of(path.stat()))))
    memory.save()


def test_an_edit_with_size_and_time_put_back_is_missed_by_a_memory_that_takes_the_mark_for_the_old_one(
    again: Any, home: Path, tmp_path: Path
) -> None:
    path = tmp_path / "clips/001.mp4"
    path.write_bytes(path.read_bytes() + bytes(100_000))  # room for any other video
    again(remember_files=True)
    before = path.stat()
    swap(path, seed=99)
    assert path.stat().st_size == before.st_size
    forge(home, before, path)  # as where a file system keeps no time of the last change of anything
    assert again(remember_files=True).latents.made == 0
    assert again().latents.made == 1
    swap(path, seed=98)
    assert again(remember_files=True).latents.made == 1, "that time tells"


def test_lines_are_read_back_as_they_were(tmp_path: Path) -> None:
    memory = Remembered(tmp_path)
    for number in range(20):
        memory.add(probed(number, frames=1 + number * 50))
    memory.save()
    memory = Remembered(tmp_path)
    for number in range(20):
        assert memory.probed((1, number, 2, 3, 4)) == probed(number, frames=1 + number * 50)
    assert (tmp_path / FILE).stat().st_size < 20 * 1000


def test_a_damaged_line_is_no_line_and_the_others_stay(tmp_path: Path) -> None:
    memory = Remembered(tmp_path)
    for number in range(5):
        memory.add(probed(number))
    memory.save()
    content = (tmp_path / FILE).read_bytes()
    draws = random.Random(1)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[draws.randrange(len(damaged))] ^= 1 << draws.randrange(8)
        (tmp_path / FILE).write_bytes(damaged[: draws.choice([len(damaged), draws.randrange(len(damaged))])])
        for mark in Remembered(tmp_path)._lines:
            assert Remembered(tmp_path).probed(mark) == probed(mark[1])
    (tmp_path / FILE).write_bytes(content.replace(b'{"body"', b"[[[[", 1))
    assert len(Remembered(tmp_path)._lines) == 4
    (tmp_path / FILE).write_bytes(b"[" * 3_000_000)
    assert Remembered(tmp_path)._lines == {}


def test_lines_of_another_reader_are_no_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Remembered(tmp_path)
    memory.add(probed(1))
    memory.save()
    monkeypatch.setattr(remembered, "READER", "2 av 99")
    assert Remembered(tmp_path)._lines == {}


def test_two_workers_remember_what_both_have_read(tmp_path: Path) -> None:
    one, two = Remembered(tmp_path), Remembered(tmp_path)
    one.add(probed(1))
    two.add(probed(2))
    one.save()
    two.save()
    assert len(Remembered(tmp_path)._lines) == 2


def test_the_oldest_lines_go_when_there_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Remembered(tmp_path)
    memory.add(probed(1))
    memory.save()
    monkeypatch.setattr(remembered, "FILE_BYTES", 3 * (tmp_path / FILE).stat().st_size + 100)
    for number in range(2, 8):
        memory = Remembered(tmp_path)
        memory.add(probed(number))
        memory.save()
    assert [mark[1] for mark in Remembered(tmp_path)._lines] == [5, 6, 7]


def test_a_folder_that_cannot_be_written_costs_a_warning(again: Any, home: Path, capsys: Any) -> None:
    home.parent.mkdir()
    home.write_text("no folder")
    assert again(remember_files=True).clips == 3
    assert "precompute.remember_files" in capsys.readouterr().err


def test_a_long_variable_rate_fits_a_line(tmp_path: Path) -> None:
    draws = random.Random(1)
    times = array("q", [0])
    for _ in range(20_000):
        times.append(times[-1] + draws.randrange(1, 60_000))
    long = Probed(replace(probed(1).probe, num_frames=len(times)), times)
    memory = Remembered(tmp_path)
    memory.add(long)
    memory.save()
    assert Remembered(tmp_path).probed(long.probe.mark) == long
    assert json.loads((tmp_path / FILE).read_bytes())["body"]["probe"]["sha256"] == long.probe.sha256


def test_only_a_file_that_is_there_as_it_was_is_known(tmp_path: Path) -> None:
    memory = Remembered(tmp_path)
    path = write_video(tmp_path / "clip.mp4", 1)
    memory.add(probe(path))
    memory.save()
    memory = Remembered(tmp_path)
    assert memory.mark(path) == probe(path).probe.mark
    assert memory.mark(tmp_path) is None and memory.mark(tmp_path / "nothing.mp4") is None

"""Probes in the cache: each file is read by one worker, and probes are neither trusted when old nor when damaged."""

import hashlib
import json
import os
import random
import threading
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pytest

from precompute import probes
from precompute.assignments import Part
from precompute.probes import Notes, probe_files
from precompute.report import Report
from shared.cache.storage import LocalStorage
from shared.media.picture import Look
from shared.media.probe import Probe, Probed, Skipped, mark_of, probe
from tests.corpus import config_for, run, write_corpus, write_video
from tests.faults.writer import ended, in_child


class Run(Protocol):
    def __call__(self, *, remember_files: bool = False) -> Report: ...


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


class Prober:
    """A pool that probes nothing and counts; `.txt` files are skipped, for good or not."""

    def __init__(self) -> None:
        self.probed: Counter[str] = Counter()

    def probe_all(self, paths: Iterable[Path]) -> Iterator[Probed | Skipped]:
        for path in paths:
            self.probed[path.name] += 1
            if path.suffix == ".txt":
                yield Skipped("not a video", permanent="gone" not in path.name)
            else:
                times = array("q", (index * 1_000_000 // 30 for index in range(300)))
                found = Probe(path.stem, mark_of(path.stat()), 300, 0, Look((48, 80)), "h264", "mp4", 0, 9, False, True)
                yield Probed(found, times)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Return 40 files."""
    names = [f"{number:02}.mp4" for number in range(38)] + ["bad.txt", "gone.txt"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    return [tmp_path / name for name in names]


def found(paths: list[Path], pool: Prober, part: Part = Part(0, 2), **named: Any) -> dict[Path, Probed | Skipped]:  # noqa: B008
    """Return what a worker knows of the files."""
    storage, anything = LocalStorage(str(paths[0].parent / "cache")), pool
    return dict(probe_files(storage, paths, anything, part, **{"remember": False, **named}))  # type: ignore[arg-type]


def test_a_rerun_reads_no_media_when_asked_and_finds_the_same(again: Run, tmp_path: Path) -> None:
    assert again().clips == 2 and not [*(tmp_path / "cache/probes").glob("videos-*")]
    assert read_media(again(remember_files=True))
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


def test_captions_are_tokenized_once(again: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    again()
    monkeypatch.setattr("precompute.findings.load_tokenizer", None)
    assert again().clips == 2


def test_workers_read_each_file_once(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "PATIENCE_SECONDS", 2.0)
    pool, results = Prober(), list[dict[Path, Probed | Skipped]]()
    workers = [
        threading.Thread(target=lambda part: results.append(found(paths, pool, part)), args=(Part(number, 4),))
        for number in range(4)
    ]
    readable = [path for path in paths if path.stem != "gone"]
    monkeypatch.setattr(probes, "HELP_FILES", 1)
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [pool.probed[path.name] for path in readable] == [1] * 39 and pool.probed["gone.txt"] == 4
    assert len(results) == 4 and all(result == results[0] and len(result) == 40 for result in results)


def test_a_worker_whose_neighbours_never_come_reads_their_files(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "PATIENCE_SECONDS", 0.2)
    pool = Prober()
    assert len(found(paths, pool, Part(3, 16))) == 40 and pool.probed.total() == 40


@pytest.mark.parametrize(
    ("age_seconds", "reader", "remember", "known"),
    [
        (0, "", False, True),
        (2 * probes.RUN_SECONDS, "", False, False),
        (2 * probes.RUN_SECONDS, "", True, True),
        (0, "4 av 99", True, False),
    ],
)
def test_probes_count_while_they_are_young_or_asked_for(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch, age_seconds: float, reader: str, remember: bool, known: bool
) -> None:
    monkeypatch.setattr(probes, "PATIENCE_SECONDS", 0.2)
    first = found(paths, Prober())
    for note in (paths[0].parent / "cache" / "probes").rglob("*.json"):
        then = note.stat().st_mtime - age_seconds
        os.utime(note, (then, then))
    monkeypatch.setattr(probes, "READER", reader or probes.READER)
    again = Prober()
    assert found(paths, again, remember=remember) == first
    assert (again.probed.total() == 1) == known, "the file with a transient failure is tried every time"


def test_damaged_probes_give_no_wrong_answer(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "PATIENCE_SECONDS", 0.0)
    first = found(paths, Prober())
    notes = [*(paths[0].parent / "cache" / "probes").rglob("*.json")]
    contents, draws = {note: note.read_bytes() for note in notes}, random.Random(1)
    for _ in range(10):
        for note, content in contents.items():
            damaged = bytearray(content)
            damaged[draws.randrange(len(damaged))] ^= 1 << draws.randrange(8)
            note.write_bytes(damaged[: draws.choice([len(damaged), draws.randrange(len(damaged))])])
        assert found(paths, Prober()) == first
    for note, content in contents.items():
        other = dict.fromkeys(json.loads(zlib.decompress(content)), "not a video")
        note.write_bytes(zlib.compress(json.dumps(other).encode()))  # whole, but not what its name says
    assert found(paths, Prober()) == first


def test_a_long_variable_rate_is_read_back(paths: list[Path]) -> None:
    draws, times = random.Random(1), array("q", [0])
    for _ in range(20_000):
        times.append(times[-1] + draws.randrange(1, 60_000))

    class Long(Prober):
        def probe_all(self, paths: Iterable[Path]) -> Iterator[Probed | Skipped]:
            for outcome in super().probe_all(paths):
                assert isinstance(outcome, Probed)
                yield replace(outcome, timestamps_us=times)

    first = found(paths[:2], Long(), Part(), remember=True)
    none = Prober()
    assert found(paths[:2], none, Part(), remember=True) == first and not none.probed


def test_notes_of_two_writers_are_read_by_both(tmp_path: Path) -> None:
    one, two = (Notes(LocalStorage(str(tmp_path)), "x") for _ in range(2))
    one.publish({"a": 1})
    two.publish({"b": [2]})
    assert one.refresh() and two.refresh() and not one.refresh()
    assert one.facts == two.facts == {"a": 1, "b": [2]}


@pytest.mark.parametrize("content", [b"no zlib", zlib.compress(b"[1]"), zlib.compress(b"[" * 2**20)])
def test_notes_of_another_program_are_ignored(tmp_path: Path, content: bytes) -> None:
    notes = Notes(LocalStorage(str(tmp_path)), "x")
    notes.publish({"a": 1})
    (tmp_path / "probes" / "x" / f"{hashlib.sha256(content).hexdigest()}.json").write_bytes(content)
    again = Notes(LocalStorage(str(tmp_path)), "x")
    assert again.refresh() and again.facts == {"a": 1}


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_sixteen_processes_open_each_of_2000_files_once(tmp_path: Path) -> None:
    content = write_video(tmp_path / "first.mp4", 0).read_bytes()
    paths = [tmp_path / f"{number:04}.mp4" for number in range(2_000)]
    for number, path in enumerate(paths):
        path.write_bytes(content + b"\0\0\0\x10free" + number.to_bytes(8))

    class Reader(Prober):
        def probe_all(self, paths: Iterable[Path]) -> Iterator[Probed | Skipped]:
            for path in paths:
                with (tmp_path / "opened").open("a") as log:
                    log.write(f"{path.name}\n")
                yield probe(path)

    def worker(number: int) -> None:
        assert len({str(outcome) for outcome in found(paths, Reader(), Part(number, 16)).values()}) == 2_000

    children = [in_child(partial(worker, number)) for number in range(16)]
    assert [ended(child) for child in children] == [0] * 16
    opened = Counter((tmp_path / "opened").read_text().split())
    assert len(opened) == 2_000 and set(opened.values()) == {1}

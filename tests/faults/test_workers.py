"""Whole workers with decoders and encoders, together, late, killed or stopped: the cache is always the same.

Workers are forks of this process, which has the libraries loaded already; the long form starts real commands.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from precompute.assignments import Part
from shared.cache.shard import ShardWriter
from shared.cache.storage import LocalStorage
from shared.cache.verify import verify
from shared.command import exits
from shared.config import Config
from shared.config_file import save_config
from shared.signals import raise_on_signal
from tests.corpus import config_for, run, stored_files, write_corpus
from tests.faults.writer import ended, in_child
from tests.tiny import save_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

CLIPS = 12
FINISH = ShardWriter.finish
Files = dict[str, bytes]
Sources = tuple[Path, Path]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Pipeline and clips, one of them bad."""
    folder = tmp_path_factory.mktemp("workers")
    root = write_corpus(folder / "clips", CLIPS)
    (root / "005.mp4").write_bytes(b"no video")
    return save_pipeline("2b", folder / "2b"), root


@pytest.fixture(scope="module")
def undisturbed(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Files:
    cache = tmp_path_factory.mktemp("undisturbed") / "cache"
    report = run(config_for(*sources, cache))
    assert (report.latents.made, len(report.skipped)) == (CLIPS - 1, 1)
    return stored_files(cache)


def start(config: Config, part: Part) -> int:
    return in_child(partial(run, config, part))


def check_same(cache: Path, undisturbed: Files) -> None:
    """Compare the caches byte by byte; litter counts."""
    found = stored_files(cache)
    assert found.keys() == undisturbed.keys()
    assert [name for name in found if found[name] != undisturbed[name]] == []
    assert verify(LocalStorage(str(cache)), repair=False)[1] == []


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.faults), 3])
def test_any_number_of_workers_make_the_same_cache(
    sources: Sources, undisturbed: Files, tmp_path: Path, count: int
) -> None:
    config = config_for(*sources, tmp_path / "cache")
    children = []
    for index in range(count):
        children.append(start(config, Part(index, count)))
        time.sleep(0.3 * index)
    assert [ended(child) for child in children] == [0] * count
    check_same(tmp_path / "cache", undisturbed)


def test_late_worker_with_other_settings_makes_the_same_cache(
    sources: Sources, undisturbed: Files, tmp_path: Path
) -> None:
    """Another share, other batch and shard sizes: what is assigned stays assigned."""
    config = config_for(*sources, tmp_path / "cache")
    child = start(config, Part(1, 2))
    while not list((tmp_path / "cache").glob("latents/*/*/*.json")):
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    ended(child)
    run(config_for(*sources, tmp_path / "cache", clips_per_shard=5, vae_batch_size=1))
    check_same(tmp_path / "cache", undisturbed)


def killed_and_finished(sources: Sources, cache: Path, draws: random.Random) -> int:
    """Kill two workers at random moments and let a third finish; return how many were killed in time."""
    config = config_for(*sources, cache)
    children = [start(config, Part(index, 2)) for index in range(2)]
    for child in children:
        time.sleep(draws.random() * 0.8)
        os.kill(child, signal.SIGKILL)
    kills = sum(ended(child) != 0 for child in children)
    assert verify(LocalStorage(str(cache)), repair=False)[1] == []
    assert ended(start(config, Part())) == 0
    return kills


@pytest.mark.faults
def test_thirty_random_kills_lose_nothing(sources: Sources, undisturbed: Files, tmp_path: Path) -> None:
    draws, kills = random.Random(4), 0
    for number in range(30):
        kills += killed_and_finished(sources, tmp_path / str(number), draws)
        check_same(tmp_path / str(number), undisturbed)
    assert kills >= 30


def slow_finish(writer: ShardWriter, *arguments: Any) -> Any:
    """Finish a shard and wait for the signal that is sent at its receipt; three seconds in a thread of the writer."""
    result = FINISH(writer, *arguments)
    time.sleep(3)
    return result


def stopped(config: Config, number: int, now: Callable[[], bool], *, slow: bool = False) -> tuple[int, float]:
    """Send a signal once `now()` is true; return the command's exit code and the seconds until it ended."""

    def body() -> None:
        if slow:
            ShardWriter.finish = slow_finish  # type: ignore[method-assign,assignment]

        def command() -> None:
            with raise_on_signal("finished shards are stored"):
                run(config)

        try:
            exits(command)()
        except SystemExit as leaving:
            os._exit(int(str(leaving.code)))

    child = in_child(body)
    deadline = time.monotonic() + 60
    while not now() and time.monotonic() < deadline:
        time.sleep(0.01)
    sent = time.monotonic()
    os.kill(child, number)
    return ended(child), time.monotonic() - sent


def any_file(cache: Path, pattern: str) -> bool:
    return any(cache.glob(pattern))


def test_signal_ends_a_worker_with_75_and_a_rerun_finishes(
    sources: Sources, undisturbed: Files, tmp_path: Path
) -> None:
    config = config_for(*sources, tmp_path / "cache")
    for number, stored in ((signal.SIGTERM, "prompts/*/*.json"), (signal.SIGINT, "latents/*/*/*.json")):
        code, took = stopped(config, number, partial(any_file, tmp_path / "cache", stored), slow=True)
        assert code == 75 and took < 10
    run(config)
    check_same(tmp_path / "cache", undisturbed)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["precompute", "plan"])
def test_signal_during_imports_ends_the_command_with_75(name: str, sources: Sources, tmp_path: Path) -> None:
    save_config(config_for(*sources, tmp_path / "cache"), tmp_path / "config.toml")
    command = [sys.executable, "-m", "precog", name, str(tmp_path / "config.toml")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        while "libtorch" not in Path(f"/proc/{child.pid}/maps").read_text():
            time.sleep(0.01)
        child.terminate()
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 75 and errors.splitlines()[-1].startswith("precog: stopped by a signal")

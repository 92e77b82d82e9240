"""Whole workers, with decoders and encoders: together, late, killed, stopped; the cache is the undisturbed one.

Workers are forks of this process, which has the libraries loaded already; the long form starts real commands.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from precompute.assignments import Part
from shared.cache.storage import LocalStorage
from shared.cache.verify import verify
from shared.config import Config, save_config
from tests.corpus import config_for, run, stored_files, write_corpus
from tests.faults.test_writer import ended, in_child
from tests.tiny import save_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

CLIPS = 12


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Pipeline and clips, one of them bad."""
    folder = tmp_path_factory.mktemp("workers")
    root = write_corpus(folder / "clips", CLIPS)
    (root / "005.mp4").write_bytes(b"no video")
    return save_pipeline("2b", folder / "2b"), root


@pytest.fixture(scope="module")
def undisturbed(sources: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    cache = tmp_path_factory.mktemp("undisturbed") / "cache"
    report = run(config_for(*sources, cache))
    assert (report.latents.made, len(report.skipped)) == (CLIPS - 1, 1)
    return stored_files(cache)


def start(config: Config, part: Part) -> int:
    return in_child(lambda: run(config, part) and None)


def check_same(cache: Path, undisturbed: dict[str, bytes]) -> None:
    """Byte by byte, and every key in exactly one shard."""
    found = stored_files(cache)
    assert found.keys() == undisturbed.keys()
    assert [name for name in found if found[name] != undisturbed[name]] == []
    assert verify(LocalStorage(str(cache)), repair=False)[1] == []


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_workers_make_the_same_cache(sources, undisturbed, tmp_path, count):
    config = config_for(*sources, tmp_path / "cache")
    children = []
    for index in range(count):
        children.append(start(config, Part(index, count)))
        time.sleep(0.3 * index)
    assert [ended(child) for child in children] == [0] * count
    check_same(tmp_path / "cache", undisturbed)


def test_a_late_worker_of_another_division_finds_the_same_plan(sources, undisturbed, tmp_path):
    """Other batch and shard sizes too: what is planned stays planned."""
    config = config_for(*sources, tmp_path / "cache")
    child = start(config, Part(1, 2))
    while not list((tmp_path / "cache").glob("latents/*/*/*.json")):
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    ended(child)
    run(config_for(*sources, tmp_path / "cache", clips_per_shard=5, vae_batch_size=1))
    check_same(tmp_path / "cache", undisturbed)


def killed_and_finished(sources: tuple[Path, Path], cache: Path, draws: random.Random) -> int:
    """Two workers, each killed at a random moment unless it was faster; then a third finishes. Kills that landed."""
    config = config_for(*sources, cache)
    children = [start(config, Part(index, 2)) for index in range(2)]
    for child in children:
        time.sleep(draws.random() * 0.8)
        os.kill(child, signal.SIGKILL)
    kills = sum(ended(child) != 0 for child in children)
    assert verify(LocalStorage(str(cache)), repair=False)[1] == []
    assert ended(start(config, Part())) == 0
    return kills


def test_workers_killed_at_random_moments_lose_nothing(sources, undisturbed, tmp_path):
    draws = random.Random(3)
    kills = 0
    for number in range(2):
        kills += killed_and_finished(sources, tmp_path / str(number), draws)
        check_same(tmp_path / str(number), undisturbed)
    assert kills >= 2


@pytest.mark.faults
def test_thirty_random_kills_lose_nothing(sources, undisturbed, tmp_path):
    draws, kills = random.Random(4), 0
    for number in range(30):
        kills += killed_and_finished(sources, tmp_path / str(number), draws)
        check_same(tmp_path / str(number), undisturbed)
    assert kills >= 30


def stopped(config: Config, number: int, now: Callable[[], bool]) -> tuple[int, float]:
    """Exit code of the whole command after a signal once `now()` is true, and how long it took to end."""

    def body() -> None:
        from precompute.run import precompute
        from shared.console import run_command
        from shared.signals import raise_on_signal

        def command() -> None:
            with raise_on_signal("finished shards are stored"):
                precompute(config)

        try:
            run_command(command)
        except SystemExit as leaving:
            os._exit(int(str(leaving.code)))

    child = in_child(body)
    deadline = time.monotonic() + 60
    while not now() and time.monotonic() < deadline:
        time.sleep(0.01)
    sent = time.monotonic()
    os.kill(child, number)
    return ended(child), time.monotonic() - sent


def test_a_stopped_worker_ends_soon_with_75_and_the_next_one_goes_on(sources, undisturbed, tmp_path):
    config = config_for(*sources, tmp_path / "cache")
    for number, stored in ((signal.SIGTERM, "prompts/*/*.json"), (signal.SIGINT, "latents/*/*/*.json")):
        code, took = stopped(config, number, lambda stored=stored: any((tmp_path / "cache").glob(stored)))
        assert code == 75 and took < 10
    run(config)
    check_same(tmp_path / "cache", undisturbed)


@pytest.mark.faults
def test_signals_at_random_moments_end_the_work_in_time_and_lose_nothing(sources, undisturbed, tmp_path):
    draws, heard = random.Random(6), 0
    for number in range(30):
        config = config_for(*sources, tmp_path / str(number // 5))
        moment = time.monotonic() + 0.2 + 2 * draws.random()
        kind = draws.choice([signal.SIGTERM, signal.SIGINT])
        code, took = stopped(config, kind, lambda moment=moment: time.monotonic() > moment)
        assert code in (0, 75) and took < 10
        heard += code == 75
        if number % 5 == 4:
            run(config)
            check_same(tmp_path / str(number // 5), undisturbed)
    assert heard > 5


@pytest.mark.faults
def test_a_command_that_is_stopped_while_it_loads_its_libraries_ends_with_75(sources, tmp_path):
    save_config(config_for(*sources, tmp_path / "cache"), tmp_path / "config.toml")
    command = [sys.executable, "-m", "precog", "precompute", str(tmp_path / "config.toml")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        while "libtorch" not in Path(f"/proc/{child.pid}/maps").read_text():
            time.sleep(0.01)
        child.terminate()
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 75 and errors.splitlines()[-1].startswith("precog: stopped by a signal")


@pytest.mark.faults
def test_real_commands_share_the_work_and_survive_kills(sources, undisturbed, tmp_path):
    cache = tmp_path / "cache"
    save_config(config_for(*sources, cache), tmp_path / "config.toml")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(part: str) -> "subprocess.Popen[bytes]":
        arguments = [sys.executable, "-m", "precog", "precompute", str(tmp_path / "config.toml"), "--part", part]
        return subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL)

    for _ in range(3):
        workers = [command("1/2"), command("2/2")]
        time.sleep(random.Random(5).uniform(4, 9))
        workers[0].kill()
        workers[1].terminate()
        assert workers[0].wait(60) in (0, -signal.SIGKILL)
        assert workers[1].wait(60) in (0, 75, -signal.SIGTERM)
    assert [worker.wait(120) for worker in (command("1/1"), command("2/3"))] == [0, 0]
    check_same(cache, undisturbed)

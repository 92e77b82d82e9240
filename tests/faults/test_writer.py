"""The writer killed at every effect, by the kernel in mid-write, and beside others: nothing is lost or torn.

Real processes, real files: a child forked from here plans and writes shards as stage 1 does and dies at a chosen point;
another one comes and finishes. The end is compared with an undisturbed cache, file by file.
"""

import contextlib
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from precompute.assignments import Part, PlannedShard, make_missing
from shared.cache.collection import collection_for, write_recipe
from shared.cache.shard import Sample, write_shard
from shared.cache.storage import TEMPORARY, LocalStorage
from shared.cache.verify import verify
from shared.errors import CacheError
from shared.fingerprint import key_of
from tests.corpus import stored_files

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

RECIPE = {"kind": "latents", "test": "writer"}
COLLECTION = collection_for("latents", RECIPE)
SAMPLES = {
    key_of(number): Sample(key_of(number), {"moments": torch.full((4, 100), float(number))}, {"number": number})
    for number in range(10)
}
SKIPPED = key_of(7)

_before_effect: Callable[[], None] | None = None


def _hear(event: str, arguments: tuple[object, ...]) -> None:
    changes = event in ("os.link", "os.rename", "os.remove", "os.mkdir")
    if _before_effect is not None and (changes or (event == "open" and str(arguments[1])[:1] in ("x", "w"))):
        _before_effect()


sys.addaudithook(_hear)


def work(root: Path, part: Part = Part()) -> None:  # noqa: B008
    """Stage 1 without its encoders."""
    storage = LocalStorage(str(root))
    write_recipe(storage, COLLECTION, RECIPE)

    def make(todo: Iterator[PlannedShard], _total: int) -> None:
        for shard in todo:
            samples = [SAMPLES[key] for key in shard.keys if key != SKIPPED]
            skipped = {SKIPPED: "broken"} if SKIPPED in shard.keys else {}
            write_shard(storage, shard.folder, samples, skipped, shard.attempt)

    folders = {key: f"{COLLECTION.folder}/{'9x32x48' if int(key, 16) % 2 else '17x32x48'}" for key in SAMPLES}
    make_missing(storage, COLLECTION, folders, make, part, keys_per_shard=2, keys_per_batch=1)


def in_child(body: Callable[[], None]) -> int:
    """The process id of a fork that runs `body` and ends without Python's clean-up."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            body()
            code = 0
        os._exit(code)
    return child


def ended(child: int) -> int:
    """Exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(root: Path, number: int, part: Part = Part()) -> int:  # noqa: B008
    """A worker that dies before its effect `number` (fsyncs count too); its exit code."""

    def body() -> None:
        global _before_effect
        left = number

        def count() -> None:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

        fsync = os.fsync

        def counted_fsync(descriptor: int) -> None:
            count()
            fsync(descriptor)

        os.fsync = counted_fsync
        _before_effect = count
        work(root, part)

    return ended(in_child(body))


def killed_in_write(root: Path, limit: int) -> int:
    """A worker that the kernel kills when a file grows beyond `limit` bytes, in the middle of the write."""

    def body() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        work(root)

    return ended(in_child(body))


def check_whole(root: Path) -> None:
    """What is there is either whole or out of every reader's sight."""
    _, damaged = verify(LocalStorage(str(root)), repair=False)
    assert damaged == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("undisturbed")
    work(root)
    return stored_files(root)


def finished(root: Path) -> dict[str, bytes]:
    """The cache once a last worker has come."""
    assert ended(in_child(lambda: work(root))) == 0
    return stored_files(root)


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.faults)])
def test_a_worker_killed_before_any_of_its_effects_loses_nothing(tmp_path, undisturbed, step):
    number = 0
    while killed_at(tmp_path / str(number), number) == -signal.SIGKILL:
        check_whole(tmp_path / str(number))
        assert finished(tmp_path / str(number)) == undisturbed, f"killed before effect {number}"
        number += step
    assert number > 50, "the worker has more effects than that: the hook does not see them"


def test_a_worker_killed_in_the_middle_of_a_write_loses_nothing(tmp_path, undisturbed):
    sizes = sorted({len(content) for content in undisturbed.values()})
    for limit in (1, 60, 200, 511, 2000, *(size - 1 for size in sizes)):
        root = tmp_path / str(limit)
        assert killed_in_write(root, limit) == -signal.SIGXFSZ
        check_whole(root)
        assert finished(root) == undisturbed, f"killed at byte {limit} of a file"


def trial(root: Path, draws: random.Random, undisturbed: dict[str, bytes]) -> int:
    """A few workers at once, some killed at random moments, some started late; how many were killed."""
    count, kills = draws.randrange(1, 4), 0
    children = []
    for index in range(count):
        part = Part(index, count)
        children.append(in_child(lambda part=part: work(root, part)))
        time.sleep(draws.random() * 0.01)
        if draws.random() < 0.7:
            time.sleep(draws.random() * 0.02)
            os.kill(children[-1], signal.SIGKILL)
    for child in children:
        code = ended(child)
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
    check_whole(root)
    assert finished(root) == undisturbed
    return kills


def test_workers_killed_at_random_moments_beside_others_lose_nothing(tmp_path, undisturbed):
    draws = random.Random(0)
    kills = sum(trial(tmp_path / str(number), draws, undisturbed) for number in range(12))
    assert kills > 3


@pytest.mark.faults
def test_hundreds_of_random_kills_lose_nothing(tmp_path, undisturbed):
    draws = random.Random(1)
    kills = sum(trial(tmp_path / str(number), draws, undisturbed) for number in range(600))
    assert kills > 300


@pytest.mark.faults
def test_crashes_in_a_row_lose_nothing(tmp_path, undisturbed):
    draws = random.Random(2)
    for number in range(200):
        root = tmp_path / str(number)
        for _ in range(draws.randrange(2, 5)):
            killed_at(root, draws.randrange(60), Part(draws.randrange(3), 3))
            check_whole(root)
        assert finished(root) == undisturbed


def test_a_full_disk_at_any_write_is_one_clear_error_and_the_rerun_finishes(tmp_path, undisturbed):
    """ENOSPC from every effect in turn."""
    import errno

    fsync = os.fsync
    for number in range(0, 40, 3):
        root, left = tmp_path / str(number), number

        def full(descriptor: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(descriptor)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", full)
            try:
                work(root)
            except CacheError as error:
                assert "the disk is full" in str(error)
            else:
                assert left >= 0
        check_whole(root)
        assert not list(root.rglob(f"{TEMPORARY}*")), "a temporary was left on a full disk"
        assert finished(root) == undisturbed


def test_workers_together_make_nothing_twice(tmp_path, undisturbed):
    """Each key in one receipt, whoever came when."""
    parts = [Part(index, 3) for index in range(3)]
    children = [in_child(lambda part=part: work(tmp_path, part)) for part in parts]
    assert [ended(child) for child in children] == [0, 0, 0]
    assert stored_files(tmp_path) == undisturbed
    assert len(list((tmp_path / "plans").iterdir())) == 1

"""Writers beside others, killed at random moments, and on a full disk: nothing is lost or torn.

Real processes, real files. `test_power_loss.py` has every state that a kill at a chosen moment may leave.
"""

import errno
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from precompute.assignments import Part
from shared.atomic_files import TEMPORARY
from shared.errors import CacheError
from tests.corpus import stored_files
from tests.faults.writer import check_whole, ended, finished, in_child, work

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("undisturbed")
    work(root)
    return stored_files(root)


def trial(root: Path, draws: random.Random, undisturbed: Files) -> int:
    """Run a few workers at once, some killed at random moments, some late; return how many were killed."""
    count, kills = draws.randrange(1, 4), 0
    children = []
    for index in range(count):
        part = Part(index, count)
        children.append(in_child(partial(work, root, part)))
        time.sleep(draws.random() * 0.01)
        if draws.random() < 0.7:
            time.sleep(draws.random() * 0.02)
            os.kill(children[-1], signal.SIGKILL)
    for child in children:
        code = ended(child)
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
    check_whole(root)
    finished(root)
    assert stored_files(root) == undisturbed
    return kills


def test_workers_killed_at_random_moments_lose_nothing(tmp_path: Path, undisturbed: Files) -> None:
    draws = random.Random(0)
    kills = sum(trial(tmp_path / str(number), draws, undisturbed) for number in range(8))
    assert kills > 2


@pytest.mark.faults
def test_hundreds_of_random_kills_lose_nothing(tmp_path: Path, undisturbed: Files) -> None:
    draws = random.Random(1)
    kills = sum(trial(tmp_path / str(number), draws, undisturbed) for number in range(600))
    assert kills > 300


def test_full_disk_at_any_write_is_one_error(tmp_path: Path, undisturbed: Files) -> None:
    """ENOSPC from every effect in turn."""
    fsync = os.fsync
    for number in range(0, 40, 5):
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
        finished(root)
        assert stored_files(root) == undisturbed


def test_workers_together_make_nothing_twice(tmp_path: Path, undisturbed: Files) -> None:
    """Each key in one receipt, whoever came when."""
    parts = [Part(index, 3) for index in range(3)]
    children = [in_child(partial(work, tmp_path, part)) for part in parts]
    assert [ended(child) for child in children] == [0, 0, 0]
    assert stored_files(tmp_path) == undisturbed
    assert len(list((tmp_path / "assignments").iterdir())) == 1

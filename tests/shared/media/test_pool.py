"""Processes that hang, crash, starve or are killed cost one clip; good clips come in order and nothing is left over."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from shared.media.child import Decoded, DecodeJob
from shared.media.decode import Requested
from shared.media.picture import Scaled
from shared.media.pool import DecodePool
from shared.media.probe import Probed, Skipped, probe
from shared.signals import SIGNALS
from tests import media
from tests.processes import decoders, wait_until

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Probed]:
    path = media.write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4")
    return path, probe(path)


@pytest.fixture(scope="module")
def good(clip: tuple[Path, Probed]) -> DecodeJob:
    return job_for(clip[0], (0, 9, 17))


@pytest.fixture(scope="module")
def shared_pool() -> Iterator[DecodePool]:
    """One process for the tests that need no fresh one; its deadline is short."""
    with DecodePool(workers=1, deadline_seconds=1.5, memory_gib=0.5) as pool:
        yield pool


def job_for(path: Path, indices: tuple[int, ...], decoder: Requested = "auto") -> DecodeJob:
    found = probe(path)
    return DecodeJob(path, found.probe, indices, tuple(found.timestamps_us[index] for index in indices), decoder)


def reasons(outcomes: list[Decoded | Skipped]) -> list[str]:
    return [outcome.decoder if isinstance(outcome, Decoded) else outcome.reason for outcome in outcomes]


def suspend(pool: DecodePool, good: DecodeJob) -> list[psutil.Process]:
    """Start the processes of a pool and suspend them, as a decoder that hangs; no job can end before its deadline."""
    list(pool.decode_all([good] * 4))
    for child in decoders():
        child.suspend()
    return decoders()


def later(action: Callable[[], object]) -> None:
    """Call the action when a job that starts now has reached its process."""
    threading.Timer(0.5, action).start()


def test_outcomes_come_in_order_and_equal_decoding_here(shared_pool: DecodePool, clip: tuple[Path, Probed]) -> None:
    path, found = clip
    jobs = [job_for(path, (index, index + 1)) for index in range(0, 24, 2)]
    outcomes = list(shared_pool.decode_all(jobs))
    for job, outcome in zip(jobs, outcomes, strict=True):
        assert isinstance(outcome, Decoded)
        assert media.indices_of(outcome.frames) == list(job.indices)
        assert np.array_equal(outcome.frames, media.decode_probed(path, found, job.indices, "auto")[0])
        outcome.frames[:] = 0  # the memory can be written


def test_probes_come_in_order_with_one_reason_per_bad_file(shared_pool: DecodePool, clip: tuple[Path, Probed]) -> None:
    path, found = clip
    bad = [path.parent / "zeros.mp4", media.write_audio(path.parent / "audio.mp4")]
    bad[0].write_bytes(bytes(4096))
    odd = media.renamed(path.parent / os.fsdecode(b"\xff\xe9.mp4"), path)
    outcomes = list(shared_pool.probe_all([path, *bad, path.parent / "nothing.mp4", odd]))
    assert outcomes[0] == found
    assert isinstance(outcomes[-1], Probed) and outcomes[-1].timestamps_us == found.timestamps_us
    skipped = [outcome for outcome in outcomes if isinstance(outcome, Skipped)]
    assert [outcome.permanent for outcome in skipped] == [True, True, False]
    assert skipped[1:] == [
        Skipped("not a video: no moving pictures in it"),
        Skipped("cannot open: No such file or directory", permanent=False),
    ]


def test_a_job_that_never_ends_ends_at_its_deadline(shared_pool: DecodePool, good: DecodeJob) -> None:
    suspend(shared_pool, good)
    begin, busy = time.monotonic(), shared_pool.busy_seconds
    outcomes = list(shared_pool.decode_all([good, good]))
    assert isinstance(outcomes[0], Skipped) and outcomes[0].reason.startswith("timed out after 1.5 s: raise ")
    assert isinstance(outcomes[1], Decoded)
    assert 1.5 <= time.monotonic() - begin < 20
    assert shared_pool.busy_seconds - busy > 1.4, "killed work counts as work"


def test_a_crash_is_the_fault_of_the_video(shared_pool: DecodePool, good: DecodeJob) -> None:
    [child] = suspend(shared_pool, good)
    child.send_signal(signal.SIGSEGV)
    later(child.resume)
    outcomes = list(shared_pool.decode_all([good, good]))
    assert outcomes[0] == Skipped("decoder died (SIGSEGV)") and isinstance(outcomes[1], Decoded)


def test_a_kill_from_outside_is_retried_once(shared_pool: DecodePool, good: DecodeJob) -> None:
    [child] = suspend(shared_pool, good)
    later(child.kill)
    assert reasons(list(shared_pool.decode_all([good]))) == ["pyav"]
    [child] = suspend(shared_pool, good)

    def kill_twice() -> None:
        child.kill()
        wait_until(lambda: decoders() not in ([], [child]))
        decoders()[0].kill()

    later(kill_twice)
    outcomes = list(shared_pool.decode_all([good]))
    assert outcomes == [Skipped("its decoder was killed (SIGKILL)", permanent=False)]


def test_a_process_that_dies_while_idle_costs_no_job(shared_pool: DecodePool, good: DecodeJob) -> None:
    for _ in range(2):
        assert reasons(list(shared_pool.decode_all([good]))) == ["pyav"]
        (child,) = decoders()
        child.kill()
    assert reasons(list(shared_pool.decode_all([good] * 2))) == ["pyav"] * 2


def test_memory_is_limited(good: DecodeJob, tmp_path: Path) -> None:
    Image.new("RGB", (3000, 3000)).save(tmp_path / "large.png")
    with DecodePool(workers=1, deadline_seconds=30, memory_gib=0.04) as pool:
        outcomes = list(pool.decode_all([good, job_for(tmp_path / "large.png", (0,)), good]))
    assert reasons(outcomes) == ["pyav", "needs more than 0.04 GiB", "pyav"]


def test_data_called_invalid_where_memory_ends_lack_memory(tmp_path: Path) -> None:
    job = job_for(media.write_clip(tmp_path / "large.mp4", frames=11, height=1088, width=1920), (0, 10))
    with DecodePool(workers=1, deadline_seconds=30, memory_gib=0.02) as pool:
        (reason,) = reasons(list(pool.decode_all([job])))
    assert reason.startswith("needs more than 0.02 GiB")


def test_processes_ignore_the_signals_that_the_parent_answers(shared_pool: DecodePool, good: DecodeJob) -> None:
    list(shared_pool.decode_all([good]))
    before = decoders()
    for number in SIGNALS:
        os.kill(before[0].pid, number)
        assert reasons(list(shared_pool.decode_all([good]))) == ["pyav"]
    assert decoders() == before


def test_an_answer_without_end_is_not_kept(good: DecodeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.media.child.ANSWER_BYTES", 100)
    with DecodePool(workers=1, deadline_seconds=60, memory_gib=2) as pool:
        [outcome] = pool.probe_all([good.path])
    assert isinstance(outcome, Skipped) and "decoder died" in outcome.reason


def test_a_module_in_the_working_directory_is_not_imported(
    tmp_path: Path, good: DecodeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "av.py").write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    with DecodePool(workers=1, deadline_seconds=30, memory_gib=1) as pool:
        assert reasons(list(pool.decode_all([good]))) == ["pyav"]


def test_a_fault_of_our_own_is_raised_and_not_blamed_on_the_clip(shared_pool: DecodePool, good: DecodeJob) -> None:
    backwards = DecodeJob(good.path, good.probe, (9, 0), (0, 0))
    with pytest.raises(RuntimeError, match="AssertionError"):
        list(shared_pool.decode_all([good, backwards]))
    assert reasons(list(shared_pool.decode_all([good]))) == ["pyav"]


def test_jobs_run_ahead_of_the_consumer_within_a_bound(shared_pool: DecodePool, good: DecodeJob) -> None:
    taken = []

    def jobs() -> Iterator[DecodeJob]:
        for number in range(12):
            taken.append(number)
            yield good

    for ahead, limit in ((0, 2), (5, 5)):
        taken.clear()
        for given, _ in enumerate(shared_pool.decode_all(jobs(), ahead=ahead)):
            assert len(taken) == min(12, given + limit)


def test_a_slow_consumer_does_not_time_out_finished_work(shared_pool: DecodePool, good: DecodeJob) -> None:
    outcomes: list[Decoded | Skipped] = []
    before = time.process_time()
    for outcome in shared_pool.decode_all([good] * 3):
        outcomes.append(outcome)
        time.sleep(1.6 if len(outcomes) == 1 else 0)
    assert reasons(outcomes) == ["pyav"] * 3
    assert time.process_time() - before < 0.3, "waiting costs processor time"


def test_leaving_the_pool_ends_its_processes_and_frees_their_frames(good: DecodeJob) -> None:
    others = decoders()

    def mapped() -> int:
        return Path("/proc/self/maps").read_text("utf-8").count("precog-frames")

    gc.collect()
    assert mapped() == 0
    descriptors = psutil.Process().num_fds()
    with DecodePool(workers=2, deadline_seconds=30, memory_gib=1) as pool:
        outcomes = list(pool.decode_all([good, good]))
        for child in decoders():
            child.suspend()
        stuck = threading.Thread(target=lambda: suppressed(pool, good))
        stuck.start()
        time.sleep(0.3)
        begin = time.monotonic()
    assert time.monotonic() - begin < 5, "work that nobody waits for is waited for"
    stuck.join(5)
    assert not stuck.is_alive() and decoders() == others
    assert mapped() == 2
    del outcomes
    gc.collect()
    assert mapped() == 0
    assert psutil.Process().num_fds() == descriptors


def suppressed(pool: DecodePool, good: DecodeJob) -> None:
    """Consume a stream that ends with the pool."""
    with contextlib.suppress(RuntimeError, CancelledError):
        list(pool.decode_all([good] * 6))


PARENT = """
import os, signal, sys
from pathlib import Path
from shared.media.pool import DecodePool
from tests.processes import decoders
with DecodePool(workers=1, deadline_seconds=100, memory_gib=1) as pool:
    list(pool.probe_all([Path(sys.argv[1])]))
    [child] = decoders()
    child.suspend()
    print(child.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_do_not_outlive_a_killed_parent(good: DecodeJob) -> None:
    command = [sys.executable, "-c", PARENT, str(good.path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    children = [psutil.Process(number) for number in map(int, done.stdout.split()) if psutil.pid_exists(number)]
    assert done.stdout and psutil.wait_procs(children, timeout=5)[1] == []


@pytest.mark.faults
def test_many_jobs_and_frames_do_not_fill_the_memory_of_a_process(tmp_path: Path, good: DecodeJob) -> None:
    path = media.write_clip(tmp_path / "large.mp4", frames=3, height=1080, width=1920)
    large = job_for(path, (0, 1, 2), "pyav")
    whole = job_for(good.path, tuple(range(30)), "pyav")
    with DecodePool(workers=1, deadline_seconds=30, memory_gib=0.2) as pool:
        assert reasons(list(pool.decode_all([whole] * 5 + [large] * 12))) == ["pyav"] * 17


@pytest.mark.faults
def test_the_memory_of_a_process_does_not_grow_with_the_number_of_pictures(tmp_path: Path) -> None:
    job = job_for(media.write_clip(tmp_path / "large.mp4", frames=24, height=1080, width=1920), tuple(range(24)))
    with DecodePool(workers=1, deadline_seconds=60, memory_gib=0.12) as pool:
        (outcome,) = pool.decode_all([replace(job, scaled=Scaled((480, 853), (0, 66, 480, 720)))])
    assert isinstance(outcome, Decoded), outcome
    assert outcome.frames.shape == (24, 480, 720, 3) and outcome.frames.dtype == np.float32

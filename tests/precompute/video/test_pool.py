"""Children that hang, crash, starve or fail cost one clip; good clips come back in order and nothing is left behind."""

import ctypes
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from precompute.video.child import Decoded, DecodeJob
from precompute.video.decode import Requested
from precompute.video.pool import DecodePool
from precompute.video.probe import BadVideo, MachineFault, Probed, probe
from tests import media


@dataclass(frozen=True)
class Sleeps(DecodeJob):
    seconds: float = 1e6

    def run(self) -> Decoded:
        time.sleep(self.seconds)
        return super().run()


@dataclass(frozen=True)
class HoldsTheInterpreter(DecodeJob):
    """As a decoder that spins in C with the GIL held: no Python signal handler or thread of the child ever runs."""

    def run(self) -> Decoded:
        ctypes.PyDLL(None).sleep(1_000_000)
        return super().run()


@dataclass(frozen=True)
class Dies(DecodeJob):
    signal: int = signal.SIGKILL

    def run(self) -> Decoded:
        os.kill(os.getpid(), self.signal)
        return super().run()


@dataclass(frozen=True)
class DiesOnce(Dies):
    """The second time it finds the mark of the first."""

    def run(self) -> Decoded:
        mark = self.path.with_suffix(f".{self.signal}")
        if mark.exists():
            return DecodeJob.run(self)
        mark.touch()
        return super().run()


@dataclass(frozen=True)
class Leaves(DecodeJob):
    def run(self) -> Decoded:
        os._exit(3)


@dataclass(frozen=True)
class Hungers(DecodeJob):
    def run(self) -> Decoded:
        return Decoded(np.ones((1, 2**30), np.uint8), "pyav")


@dataclass(frozen=True)
class TellsItsModules(DecodeJob):
    def run(self) -> Decoded:
        super().run()
        raise BadVideo(
            " ".join({name.partition(".")[0] for name in sys.modules} & {"torch", "diffusers", "av", "numpy"})
        )


@dataclass(frozen=True)
class Breaks(DecodeJob):
    def run(self) -> Decoded:
        raise ZeroDivisionError("a fault of ours")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Probed]:
    path = media.write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4")
    return path, probe(path)


@pytest.fixture
def good(clip: tuple[Path, Probed]) -> DecodeJob:
    return job_for(clip[0], (0, 9, 17))


@pytest.fixture(scope="module")
def shared_pool() -> Iterator[DecodePool]:
    """One pool for the tests whose children need not be fresh; its deadline is short."""
    with DecodePool(workers=2, deadline_seconds=5, memory_gib=0.5) as pool:
        yield pool


def job_for(path: Path, indices: tuple[int, ...], decoder: Requested = "auto") -> DecodeJob:
    found = probe(path)
    return DecodeJob(path, found.probe, indices, tuple(found.timestamps_us[index] for index in indices), decoder)


def told(outcomes: list[Decoded | BadVideo | MachineFault]) -> list[str]:
    return [outcome.decoder if isinstance(outcome, Decoded) else outcome.reason for outcome in outcomes]


def like(kind: type[DecodeJob], job: DecodeJob, **settings: float) -> DecodeJob:
    return kind(job.path, job.probe, job.indices, job.timestamps_us, job.decoder, **settings)


def test_results_come_in_order_and_equal_decoding_here(shared_pool: DecodePool, clip: tuple[Path, Probed]) -> None:
    path, found = clip
    jobs = [job_for(path, (index, index + 1)) for index in range(0, 24, 2)]
    outcomes = list(shared_pool.decode_all(jobs))
    for job, outcome in zip(jobs, outcomes, strict=True):
        assert isinstance(outcome, Decoded)
        assert media.indices_of(outcome.frames) == list(job.indices)
        assert np.array_equal(outcome.frames, media.decode_probed(path, found, job.indices, "auto")[0])
        outcome.frames[:] = 0  # the memory is ours to write


def test_probes_come_in_order_with_one_reason_per_bad_file(shared_pool: DecodePool, clip: tuple[Path, Probed]) -> None:
    path, found = clip
    folder = path.parent
    bad = [
        media.write_zeros(folder / "zeros.mp4"),
        media.write_text(folder / "text.mp4"),
        media.write_playlist(folder / "playlist.mp4", path),
        media.write_audio(folder / "audio.mp4"),
        media.write_without_index(folder / "no_moov.mp4", path),
    ]
    outcomes = list(shared_pool.probe_all([path, *bad, folder / "nothing.mp4", path]))
    assert outcomes[0] == outcomes[-1] == found
    assert len(outcomes) == len(bad) + 3 and all(isinstance(outcome, BadVideo) for outcome in outcomes[1:-2])
    assert isinstance(outcomes[-2], MachineFault)


@pytest.mark.parametrize("kind", [Sleeps, HoldsTheInterpreter])
def test_a_job_that_never_ends_ends_at_its_deadline(
    kind: type[DecodeJob], shared_pool: DecodePool, good: DecodeJob
) -> None:
    begin, busy = time.monotonic(), shared_pool.busy_seconds()
    outcomes = list(shared_pool.decode_all([good, like(kind, good), good, good]))
    assert told(outcomes) == ["pyav", "timed out after 5 s", "pyav", "pyav"]
    assert shared_pool.busy_seconds() - busy > 4.9, "what is killed was work, too"
    assert 5 <= time.monotonic() - begin < 20


def test_a_child_that_crashes_costs_its_own_job_only(shared_pool: DecodePool, good: DecodeJob) -> None:
    jobs = [good, like(Dies, good, signal=signal.SIGABRT), good, like(Dies, good, signal=signal.SIGSEGV)]
    outcomes = list(shared_pool.decode_all([*jobs, like(Leaves, good), good]))
    assert told(outcomes) == [
        "pyav",
        "decoder died (SIGABRT)",
        "pyav",
        "decoder died (SIGSEGV)",
        "decoder died (exit code 3)",
        "pyav",
    ]
    assert not any(isinstance(outcome, MachineFault) for outcome in outcomes)


def test_a_child_that_is_killed_from_outside_is_not_the_videos_fault(shared_pool: DecodePool, good: DecodeJob) -> None:
    outcomes = list(shared_pool.decode_all([good, like(Dies, good), good]))
    assert told(outcomes) == ["pyav", "its decoder was killed (SIGKILL)", "pyav"]
    assert isinstance(outcomes[1], MachineFault)


def test_what_the_machine_spoilt_is_tried_once_more(shared_pool: DecodePool, good: DecodeJob) -> None:
    jobs = [good, like(DiesOnce, good), like(DiesOnce, good, signal=signal.SIGBUS), good]
    assert told(list(shared_pool.decode_all(jobs))) == ["pyav"] * 4


def test_a_child_that_dies_while_idle_costs_no_job(shared_pool: DecodePool, good: DecodeJob) -> None:
    assert told(list(shared_pool.decode_all([good] * 4))) == ["pyav"] * 4
    children = [psutil.Process(child.pid) for child in multiprocessing.active_children()]
    for child in children:
        child.kill()
    psutil.wait_procs(children, timeout=5)
    assert told(list(shared_pool.decode_all([good] * 4))) == ["pyav"] * 4


def test_memory_is_limited(shared_pool: DecodePool, good: DecodeJob) -> None:
    whole = job_for(good.path, (0,) * 60_000)
    outcomes = list(shared_pool.decode_all([like(Hungers, good), good, whole, good]))
    assert told(outcomes) == ["needs more than 0.5 GiB", "pyav", "needs more than 0.5 GiB", "pyav"]


def test_a_decoder_that_calls_data_invalid_where_memory_ends_is_not_believed(tmp_path: Path) -> None:
    job = job_for(media.write_clip(tmp_path / "large.mp4", frames=20, height=1088, width=1920), (0, 10))
    for memory_gib in (0.02, 0.03, 0.04):
        with DecodePool(workers=1, deadline_seconds=30, memory_gib=memory_gib) as pool:
            (reason,) = told(list(pool.decode_all([job])))
        assert reason.startswith(f"needs more than {memory_gib:g} GiB")


def test_a_child_imports_the_decoder_and_not_torch(shared_pool: DecodePool, good: DecodeJob) -> None:
    (outcome,) = shared_pool.decode_all([like(TellsItsModules, good)])
    assert isinstance(outcome, BadVideo)
    assert set(outcome.reason.split()) == {"av", "numpy"}


def test_a_fault_of_ours_is_raised_and_not_blamed_on_the_clip(shared_pool: DecodePool, good: DecodeJob) -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError: a fault of ours"):
        list(shared_pool.decode_all([good, like(Breaks, good)]))
    assert told(list(shared_pool.decode_all([good]))) == ["pyav"]


def test_jobs_are_taken_a_bounded_way_ahead(shared_pool: DecodePool, good: DecodeJob) -> None:
    taken = []

    def jobs() -> Iterator[DecodeJob]:
        for number in range(20):
            taken.append(number)
            yield good

    for given, _ in enumerate(shared_pool.decode_all(jobs())):
        assert len(taken) <= given + 2 * 2
    assert len(taken) == 20


def test_a_stream_that_is_left_early_leaves_the_pool_usable(shared_pool: DecodePool, good: DecodeJob) -> None:
    outcomes = shared_pool.decode_all([good, like(Sleeps, good), like(Sleeps, good), good])
    assert isinstance(next(outcomes), Decoded)
    outcomes.close()  # type: ignore[attr-defined]
    begin = time.monotonic()
    assert told(list(shared_pool.decode_all([good, good]))) == ["pyav", "pyav"]
    assert time.monotonic() - begin < 2


def test_waiting_costs_no_processor_time_and_work_is_counted(shared_pool: DecodePool, good: DecodeJob) -> None:
    busy = shared_pool.busy_seconds()
    before = time.process_time()
    assert told(list(shared_pool.decode_all([like(Sleeps, good, seconds=1)] * 2))) == ["pyav"] * 2
    assert time.process_time() - before < 0.3
    assert 2 <= shared_pool.busy_seconds() - busy < 6


def test_a_slow_consumer_does_not_time_out_finished_work(good: DecodeJob) -> None:
    with DecodePool(workers=1, deadline_seconds=1.5, memory_gib=1) as pool:
        outcomes = []
        for outcome in pool.decode_all([good] * 3):
            time.sleep(1.6)
            outcomes.append(outcome)
    assert told(outcomes) == ["pyav"] * 3


def test_children_ignore_the_signals_that_the_parent_answers(good: DecodeJob) -> None:
    others = set(multiprocessing.active_children())
    with DecodePool(workers=1, deadline_seconds=30, memory_gib=1) as pool:
        (child,) = set(multiprocessing.active_children()) - others
        assert child.pid is not None

        def jobs() -> Iterator[DecodeJob]:
            for number in (signal.SIGINT, signal.SIGTERM) * 3:
                os.kill(child.pid or 0, number)  # while it starts, sleeps, works and waits
                yield like(Sleeps, good, seconds=0.1)

        assert told(list(pool.decode_all(jobs()))) == ["pyav"] * 6
        assert set(multiprocessing.active_children()) - others == {child}


def test_leaving_the_pool_ends_its_children_and_frees_their_frames(good: DecodeJob) -> None:
    others = set(multiprocessing.active_children())

    def mapped() -> int:
        return Path("/proc/self/maps").read_text("utf-8").count("precog-frames")

    gc.collect()
    assert mapped() == 0
    descriptors = psutil.Process().num_fds()
    with DecodePool(workers=2, deadline_seconds=30, memory_gib=1) as pool:
        outcomes = list(pool.decode_all([good, good, like(Dies, good), good]))
        assert len(set(multiprocessing.active_children()) - others) >= 1
    assert set(multiprocessing.active_children()) == others
    assert mapped() == 3
    del outcomes
    gc.collect()
    assert mapped() == 0
    assert psutil.Process().num_fds() == descriptors


PARENT = """
import multiprocessing, os, signal, sys
from pathlib import Path
from precompute.video.pool import DecodePool
from precompute.video.probe import probe
from tests.precompute.test_pool import Sleeps

if __name__ == "__main__":
    path = Path(sys.argv[1])
    jobs = [Sleeps(path, probe(path).probe, (0,), (0,), seconds=seconds) for seconds in (0.5, 1e6)]
    with DecodePool(workers=2, deadline_seconds=1, memory_gib=1) as pool:
        for outcome in pool.decode_all(jobs):
            print(*[child.pid for child in multiprocessing.active_children()], flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_children_do_not_outlive_a_killed_parent(tmp_path: Path, good: DecodeJob) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT, "utf-8")
    command = [sys.executable, str(script), str(good.path)]
    root = Path(__file__).parents[3]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": str(root)}, check=False)
    assert told.returncode == -signal.SIGKILL
    numbers = [int(number) for number in told.stdout.split()]
    assert len(numbers) == 2
    children = [psutil.Process(number) for number in numbers if psutil.pid_exists(number)]
    assert psutil.wait_procs(children, timeout=10)[1] == []


def test_many_jobs_and_frames_do_not_fill_a_childs_memory(tmp_path: Path, good: DecodeJob) -> None:
    path = media.write_clip(tmp_path / "large.mp4", frames=3, height=1080, width=1920)
    large = job_for(path, (0, 1, 2), "pyav")
    whole = job_for(good.path, tuple(range(30)), "pyav")
    with DecodePool(workers=1, deadline_seconds=30, memory_gib=0.2) as pool:
        assert told(list(pool.decode_all([whole] * 5 + [large] * 30))) == ["pyav"] * 35


def test_fifty_megabytes_come_back_quickly(tmp_path: Path) -> None:
    path = media.write_clip(tmp_path / "large.mp4", frames=4, height=480, width=720)
    job = job_for(path, (0,) * 48 + (3,), "pyav")
    begin = time.process_time()
    with DecodePool(workers=1, deadline_seconds=30, memory_gib=4) as pool:
        (outcome,) = pool.decode_all([job])
    assert isinstance(outcome, Decoded) and outcome.frames.nbytes == 49 * 480 * 720 * 3
    assert media.indices_of(outcome.frames[[0, 48]]) == [0, 3]
    assert time.process_time() - begin < 0.5, "the parent copies frames"

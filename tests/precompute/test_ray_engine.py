"""`--engine ray`: the same cache as one process makes, a killed worker started again, nothing open to the network.

The runs need Ray (`pip install 'precog[ray]'`) and are left out without it.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from precompute.assignments import Part
from precompute.ray_engine import Worker, _slots, precompute_with_ray
from precompute.report import Report, Tally, merge
from shared.config import Config
from shared.errors import DataError, Preempted, UsageError
from tests.corpus import config_for, run, stored_files, write_corpus


def test_without_ray_the_extra_is_named(pipeline, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'precog\[ray\]'"):
        precompute_with_ray(config_for(pipeline, tmp_path, "cache"))


@pytest.mark.parametrize(
    ("resources", "decode_workers", "count", "needs"),
    [
        ({"CPU": 64.0, "GPU": 8.0}, 4, 8, {"num_gpus": 1, "num_cpus": 5}),
        ({"CPU": 8.0, "GPU": 8.0}, 4, 8, {"num_gpus": 1, "num_cpus": 1}),
        ({"CPU": 8.0}, 3, 2, {"num_cpus": 4}),
        ({"CPU": 2.0}, 3, 1, {"num_cpus": 2}),
    ],
)
def test_there_is_a_worker_for_every_gpu_or_for_every_slot_of_processors(resources, decode_workers, count, needs):
    assert _slots(resources, decode_workers) == (count, needs)


def test_workers_reports_add_up():
    one = Report(clips=9, latents=Tally(4, 5), written_bytes=10, seconds={"total": 2.0})
    two = Report(clips=9, latents=Tally(3, 6), written_bytes=20, seconds={"total": 3.0, "write": 1.0})
    both = merge([one, two])
    assert (both.clips, both.latents.made, both.latents.reused, both.written_bytes) == (9, 7, 2, 30)
    assert both.seconds == {"total": 3.0, "write": 1.0}


@pytest.mark.parametrize(("address", "reason"), [("auto", "Could not find any"), ("nonsense", "Invalid address")])
def test_a_cluster_that_is_not_there_is_one_line(pipeline, tmp_path, monkeypatch, address, reason):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where a cluster of this machine would be noted
    with pytest.raises(
        UsageError, match=rf"RAY_ADDRESS = '{address}': no Ray cluster answers there \({reason}"
    ) as caught:
        precompute_with_ray(config_for(pipeline, tmp_path, "cache"))
    assert "\n" not in str(caught.value)


@pytest.mark.faults
def test_a_cluster_made_here_listens_on_the_loopback_only():
    pytest.importorskip("ray")
    script = """
import psutil
from precompute import ray_engine

def listeners(ray, config, workers):
    ray.get(ray.remote(lambda: None).remote())
    here = psutil.Process()
    sockets = [socket for process in (here, *here.children(recursive=True)) for socket in process.net_connections()]
    print(*{socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN})

ray_engine._run = listeners
ray_engine.precompute_with_ray(None)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    found = set(done.stdout.split())
    assert found and found <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, done.stdout + done.stderr


@pytest.fixture(scope="module")
def cluster():
    """Four slots, whatever the machine has, on the loopback."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=4, include_dashboard=False, configure_logging=False)
    yield ray
    ray.shutdown()


@pytest.mark.faults
def test_two_workers_make_what_one_process_makes(cluster, pipeline, tmp_path):
    root = write_corpus(tmp_path / "clips", 10)
    run(config_for(pipeline, root, tmp_path / "alone"))
    report = precompute_with_ray(config_for(pipeline, root, tmp_path / "cache"))
    assert stored_files(tmp_path / "cache") == stored_files(tmp_path / "alone")
    assert (report.clips, report.latents.reused) == (10, 0) and report.latents.made >= 10


@pytest.mark.faults
def test_a_users_fault_is_raised_here_as_it_was_there(cluster, pipeline, tmp_path):
    root = write_corpus(tmp_path / "clips", 2)
    (root / "prompts.txt").write_text("only one")
    with pytest.raises(DataError) as caught:
        precompute_with_ray(config_for(pipeline, root, tmp_path / "cache"))
    assert type(caught.value) is DataError and "\n" not in str(caught.value)


@pytest.mark.faults
def test_a_killed_worker_is_started_again_and_finishes(cluster, pipeline, tmp_path, monkeypatch):
    root, cache = write_corpus(tmp_path / "clips", 24), tmp_path / "cache"
    run(config_for(pipeline, root, tmp_path / "alone"))

    class KilledOnce(Worker):
        """Whoever writes the first shard of clips dies then."""

        def precompute(self, config: Config, part: Part) -> Report:
            from precompute import latents

            mark, write = Path(config.precompute.cache).with_name("killed"), latents.write_shard

            def write_and_die(*arguments):
                written = write(*arguments)
                with contextlib.suppress(FileExistsError):
                    mark.touch(exist_ok=False)
                    os.kill(os.getpid(), signal.SIGKILL)
                return written

            latents.write_shard = write_and_die
            return super().precompute(config, part)

    monkeypatch.setattr("precompute.ray_engine.Worker", KilledOnce)
    report = precompute_with_ray(config_for(pipeline, root, cache))
    assert (tmp_path / "killed").exists() and report.clips == 24
    assert stored_files(cache) == stored_files(tmp_path / "alone")


@pytest.mark.faults
def test_a_signal_ends_the_workers_and_the_next_run_goes_on(cluster, pipeline, tmp_path):
    root, cache = write_corpus(tmp_path / "clips", 12), tmp_path / "cache"
    timer = threading.Timer(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(Preempted):
        precompute_with_ray(config_for(pipeline, root, cache))
    assert precompute_with_ray(config_for(pipeline, root, cache)).clips == 12

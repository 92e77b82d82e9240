"""`--engine ray`: the same cache as one process makes, killed workers restarted, no server beyond the loopback."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from precompute.assignments import Part
from precompute.ray_engine import Worker, precompute_with_ray, worker_slots
from precompute.report import Report
from shared.cache.shard import Receipt, ShardWriter
from shared.config import Config
from shared.errors import DataError, Preempted, UsageError
from tests.corpus import config_for, stored_files, write_corpus


def test_missing_ray_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r'Ray is not installed; run `make setup EXTRAS="ray"`'):
        precompute_with_ray(config_for(tmp_path, tmp_path, "cache"))


@pytest.mark.parametrize(
    ("resources", "decode_workers", "count", "needs"),
    [
        ({"CPU": 64.0, "GPU": 8.0}, 4, 8, {"num_gpus": 1, "num_cpus": 5}),
        ({"CPU": 8.0, "GPU": 8.0}, 4, 8, {"num_gpus": 1, "num_cpus": 1}),
        ({"CPU": 8.0}, 3, 2, {"num_cpus": 4}),
        ({"CPU": 2.0}, 3, 1, {"num_cpus": 2}),
    ],
)
def test_there_is_a_worker_per_gpu_or_per_cpu_slot(
    resources: dict[str, float], decode_workers: int, count: int, needs: dict[str, float]
) -> None:
    assert worker_slots(resources, decode_workers) == (count, needs)


@pytest.mark.parametrize(("address", "reason"), [("auto", "Could not find any"), ("nonsense", "Invalid address")])
def test_missing_cluster_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, reason: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # the place where a cluster of this machine would be noted
    with pytest.raises(UsageError, match=rf"RAY_ADDRESS = '{address}': no cluster answers \({reason}") as caught:
        precompute_with_ray(config_for(tmp_path, tmp_path, "cache"))
    assert "\n" not in str(caught.value)


@pytest.mark.faults
def test_local_cluster_listens_on_the_loopback_only() -> None:
    script = """
import psutil
from precompute import ray_engine

def listeners(*_):
    import ray  # reads its settings when it is imported
    ray.get(ray.remote(lambda: None).remote())
    here = psutil.Process()
    sockets = [socket for process in (here, *here.children(recursive=True)) for socket in process.net_connections()]
    print(*{socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN})
    raise SystemExit

ray_engine.worker_slots = listeners
from types import SimpleNamespace as Table
ray_engine.precompute_with_ray(Table(precompute=Table(decode_workers=1)))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    found = set(done.stdout.split())
    assert found and found <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, done.stdout + done.stderr


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Start a cluster of two slots on the loopback."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # read when Ray is imported
    import ray

    ray.init(num_cpus=4, include_dashboard=False, configure_logging=False)
    yield
    ray.shutdown()


class KilledOnce(Worker):
    """A worker; the first one that has written a shard of clips dies then."""

    def precompute(self, config: Config, part: Part) -> Report:
        mark = Path(config.precompute.cache).with_name("killed")

        finish = ShardWriter.finish

        def finish_and_die(writer: ShardWriter, *arguments: Any) -> tuple[Receipt, int]:
            written = finish(writer, *arguments)
            if not written[0].folder.startswith("latents"):
                return written
            with contextlib.suppress(FileExistsError):
                mark.touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
            return written

        setattr(ShardWriter, "finish", finish_and_die)  # noqa: B010
        return super().precompute(config, part)


@pytest.mark.faults
@pytest.mark.usefixtures("cluster")
def test_killed_worker_is_restarted_and_the_cache_is_the_same(
    pipeline: Path, filled: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, alone = filled
    monkeypatch.setattr("precompute.ray_engine.Worker", KilledOnce)
    report = precompute_with_ray(config_for(pipeline, root, tmp_path / "new"))
    assert (tmp_path / "killed").exists() and report.clips == 6
    assert stored_files(tmp_path / "new") == stored_files(alone)


@pytest.mark.faults
@pytest.mark.usefixtures("cluster")
def test_workers_error_is_raised_as_it_was(pipeline: Path, tmp_path: Path) -> None:
    root = write_corpus(tmp_path / "clips", 2)
    (root / "prompts.txt").write_text("only one")
    with pytest.raises(DataError) as caught:
        precompute_with_ray(config_for(pipeline, root, tmp_path / "cache"))
    assert type(caught.value) is DataError and "\n" not in str(caught.value)


@pytest.mark.faults
@pytest.mark.usefixtures("cluster")
def test_signal_ends_the_workers_and_a_rerun_finishes(pipeline: Path, tmp_path: Path) -> None:
    root, cache = write_corpus(tmp_path / "clips", 12), tmp_path / "cache"
    timer = threading.Timer(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(Preempted):
        precompute_with_ray(config_for(pipeline, root, cache))
    assert precompute_with_ray(config_for(pipeline, root, cache)).clips == 12

"""`--engine ray` on a cluster of three nodes, one of which is killed: the cache is that of one worker."""

import os
import threading
import time
from pathlib import Path

import pytest

from precompute.ray_engine import precompute_with_ray
from tests.corpus import config_for, run, stored_files, write_corpus

CLIPS = 24


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_killed_node_changes_nothing(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # read when Ray is imported: servers on the loopback only
    import ray
    from ray.cluster_utils import Cluster

    root = write_corpus(tmp_path / "clips", CLIPS)
    run(config_for(pipeline, root, tmp_path / "alone", clips_per_shard=1))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    cache, killed = tmp_path / "cache", threading.Event()

    def kill_node() -> None:
        while not list(cache.glob("latents/*/*/*.json")):
            time.sleep(0.01)
        cluster.remove_node(nodes[0], allow_graceful=False)
        killed.set()

    try:
        ray.init(address=cluster.address, configure_logging=False)
        assert len(ray.nodes()) == 3
        threading.Thread(target=kill_node, daemon=True).start()
        report = precompute_with_ray(config_for(pipeline, root, cache, clips_per_shard=1))
        assert killed.wait(60)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert report.clips == CLIPS and "the other workers make its shards" in capsys.readouterr().err
    assert stored_files(cache) == stored_files(tmp_path / "alone")

"""One thread, because the test models are tiny, and no network but loopback. Fixtures of a session are made once."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch

from shared.config import Config, Data, Model, Precompute, Train
from tests import tiny

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CLIPS = Path(__file__).parents[1] / "demo" / "clips"
Settings = Callable[..., Config]

torch.set_num_threads(1)
# a busy machine must not fail a test
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest file first, so that no worker ends alone with it."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.fixture(scope="session")
def server() -> Iterator[int]:
    """Run moto's S3 server; return its port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.05)
    yield port
    process.terminate()
    process.wait(10)


@pytest.fixture(scope="session")
def browser() -> Iterator["Browser"]:
    """Start headless Chromium, for tests with the mark `browser`; they are skipped where it is not installed."""
    from tests.report.browser import chromium

    with chromium() as started:
        yield started


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny pipeline in the 2B layout; tests that change a file copy it first."""
    return tiny.save_pipeline("2b", tmp_path_factory.mktemp("pipeline") / "2b")


@pytest.fixture(scope="session")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Precompute seven clips to train on and one held out, of mixed frame counts, for a sincos transformer."""
    from precompute.run import precompute

    folder = tmp_path_factory.mktemp("experiment")
    config = Config(
        model=Model(pretrained_model_name_or_path=str(tiny.save_pipeline("2b", folder / "tiny"))),
        data=Data(
            name="clips",
            instance_data_root=CLIPS,
            caption_column="prompts.txt",
            video_column="videos.txt",
            fps=0,
            frame_buckets=(9, 17),
            resolution_buckets=((32, 48), (48, 32)),
            max_num_frames=17,
            held_out_clips=1,
        ),
        precompute=Precompute(cache=str(folder / "cache")),
        train=Train(
            output_dir=folder / "unused",
            lora_rank=4,
            lora_alpha=8,
            learning_rate=1e-2,
            max_train_steps=3,
            global_batch_size=2,
            checkpointing_steps=100,
            device="cpu",
        ),
    )
    precompute(config)
    return config


@pytest.fixture
def settings(experiment: Config, tmp_path: Path) -> Settings:
    """Change fields of [train], with a run folder of the test's own."""

    def change(name: str = "run", **values: Any) -> Config:
        train = experiment.train.model_dump() | {"output_dir": tmp_path / name} | values
        return experiment.model_copy(update={"train": Train(**train)})

    return change

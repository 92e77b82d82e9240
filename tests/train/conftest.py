"""A tiny pipeline and a cache made by stage 1, once per session; runs in this process and in processes of their own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.config import Config, Data, Model, Precompute, Train
from shared.preemption import StopSignal
from tests import tiny

CLIPS = Path(__file__).parents[2] / "demo" / "clips"
Settings = Callable[..., Config]


@pytest.fixture(scope="session")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Seven clips to train on, one held out, of mixed frame counts; a sincos transformer of 64 channels."""
    from precompute.plan import Part
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
    precompute(config, Part(0, 1), StopSignal())
    return config


@pytest.fixture
def settings(experiment: Config, tmp_path: Path) -> Settings:
    """The experiment with other fields of [train], in a run folder of this test's own."""

    def change(name: str = "run", **values: Any) -> Config:
        train = experiment.train.model_dump() | {"output_dir": tmp_path / name} | values
        return experiment.model_copy(update={"train": Train(**train)})

    return change

"""An experiment in a folder: two bar-coded clips with captions, a tiny pipeline of any variant, and its config."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from precompute.run import precompute
from shared.config import Config, Data, Model, Precompute, Train
from tests.media import write_clip
from tests.tiny import save_pipeline

CAPTIONS = ("a grey rabbit yawns", "a white bird glides")
FRAMES, HEIGHT, WIDTH = 9, 64, 96
"""The size of the tiny learned position table."""


def write_experiment(variant: str, folder: Path, **train: object) -> Config:
    """Write clips and pipeline into `folder`, without a cache; `train` are fields of [train]."""
    clips = folder / "clips"
    if not clips.exists():
        clips.mkdir(parents=True)
        for number, caption in enumerate(CAPTIONS):
            write_clip(clips / f"{number}.mp4", frames=FRAMES * (number + 1), height=HEIGHT, width=WIDTH)
            (clips / f"{number}.txt").write_text(caption, "utf-8")
    model = folder / "model"
    if not model.exists():
        save_pipeline(variant, model)
    settings = {"output_dir": folder / "run", "global_batch_size": 2, "max_tokens_per_pack": 1024, "device": "cpu"}
    return Config(
        model=Model(pretrained_model_name_or_path=str(model)),
        data=Data(
            name="two",
            instance_data_root=clips,
            fps=0,
            frame_buckets=(FRAMES,),
            max_num_frames=FRAMES,
            resolution_buckets=((HEIGHT, WIDTH),),
            validation_prompts=CAPTIONS[:1],
        ),
        precompute=Precompute(cache=str(folder / "cache"), device="cpu", noised_image_count=2, decode_workers=1),
        train=Train.model_validate(settings | train),
    )


def changed(config: Config, **tables: Mapping[str, Any]) -> Config:
    """Return the config with other values of some fields, unchecked: `changed(config, train={"lora_rank": 4})`."""
    tables_now = {name: getattr(config, name).model_copy(update=fields) for name, fields in tables.items()}
    return config.model_copy(update=tables_now)


def fill_cache(config: Config) -> None:
    """Run stage 1."""
    precompute(config)

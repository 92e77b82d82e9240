"""Staleness: stage 2 refuses a view of other settings or other encoders, without loading the encoders."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.cache.collection import Collection
from shared.cache.staleness import shaping_settings, stale_settings
from shared.cache.storage import LocalStorage
from shared.cache.view import View, read_view
from shared.config import Config, fields_shaping
from shared.errors import CacheError
from shared.model.pretrained import present_part
from tests.experiments import fill_cache, write_experiment
from tests.tiny import build_text_encoder, build_vae
from train.open_run import open_run

CHANGES: dict[str, Any] = {
    "data.default_caption": "a dog",
    "data.caption_column": "long_caption",
    "data.fps": 16,
    "data.frame_buckets": (9, 33),
    "data.held_out_clips": 1,
    "data.height": 32,
    "data.id_token": "BW_STYLE",
    "data.max_num_frames": 9,
    "data.random_flip": True,
    "data.resolution_buckets": ((48, 32),),
    "data.skip_frames_end": 1,
    "data.skip_frames_start": 1,
    "data.video_column": "clip",
    "data.video_reshape_mode": "letterbox",
    "data.width": 32,
    "data.window_placement": "consecutive",
    "data.windows_per_clip": 2,
    "precompute.channels_last": True,
    "precompute.compile_vae": True,
    "precompute.enable_slicing": True,
    "precompute.enable_tiling": True,
    "precompute.text_dtype": "fp16",
    "precompute.vae_dtype": "fp16",
}
PROMPTS = {"data.negative_prompt": "blurry", "data.validation_prompts": ("a dog",)}
LATENTS: dict[str, Any] = {"precision": "fp32", "image_conditions": None}
IMAGE_LATENTS: dict[str, Any] = {"precision": "fp32", "image_conditions": {"noised": 4}}
TEXT: dict[str, Any] = {"precision": "bf16"}


@pytest.fixture
def config() -> Config:
    prompts = {"validation_prompts": ["a rabbit", "a bird"]}
    buckets = {"frame_buckets": [9, 17], "resolution_buckets": [[32, 48]]}
    return Config.model_validate(
        {
            "model": {"pretrained_model_name_or_path": "tiny"},
            "data": {"name": "clips", "instance_data_root": "clips", **buckets, **prompts},
            "precompute": {"cache": "cache"},
            "train": {"output_dir": "run"},
        }
    )


def changed(config: Config, **fields: Any) -> Config:
    for name, value in fields.items():
        table, field = name.split(".")
        config = config.model_copy(update={table: getattr(config, table).model_copy(update={field: value})})
    return config


def view_of(config: Config, *, image_to_video: bool = False) -> View:
    special = dict.fromkeys((*config.data.validation_prompts, config.data.negative_prompt, ""), "key")
    settings = shaping_settings(config, image_to_video=image_to_video)
    return View("clips", Collection("latents", "1"), Collection("prompts", "2"), special, (), settings=settings)


def test_every_shaping_field_is_compared() -> None:
    fields = fields_shaping("clips", "buckets", "view", "latents", "prompts")
    assert set(fields) == CHANGES.keys()
    assert fields_shaping("image_latents") == ["precompute.noised_image_count"]


@pytest.mark.parametrize("field", CHANGES)
def test_changed_field_is_named_with_both_values(field: str, config: Config) -> None:
    other = changed(config, **{"data.height": 64, "data.width": 64} if field in ("data.height", "data.width") else {})
    (line,) = stale_settings(changed(other, **{field: CHANGES[field]}), view_of(other), LATENTS, TEXT)
    named = {"data.height": "data.resolution_buckets", "data.width": "data.resolution_buckets"}
    named["data.max_num_frames"] = "data.frame_buckets"
    assert line.startswith(f"view clips: made with other settings than this config's: {named.get(field, field)} was ")
    assert ", is " in line and "run `precog precompute` with this config" in line


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.dataset_name", "clips.csv"),
        ("data.instance_data_root", Path("elsewhere")),
        ("precompute.cache", "s3://elsewhere/cache"),
        ("precompute.vae_dtype", "fp32"),  # as resolved
        ("precompute.text_dtype", "bf16"),
        ("data.frame_buckets", (17, 9, 81)),  # no clip can have 81
    ],
)
def test_places_resolved_values_and_impossible_buckets_may_change(field: str, value: object, config: Config) -> None:
    assert list(stale_settings(changed(config, **{field: value}), view_of(config), LATENTS, TEXT)) == []


def test_noised_images_matter_to_image_to_video_only(config: Config) -> None:
    other = changed(config, **{"precompute.noised_image_count": 1})
    assert list(stale_settings(other, view_of(config), LATENTS, TEXT)) == []
    (line,) = stale_settings(other, view_of(config, image_to_video=True), IMAGE_LATENTS, TEXT)
    assert "precompute.noised_image_count was 4, is 1" in line


def test_new_validation_prompt_is_missing_and_fewer_are_fine(config: Config) -> None:
    view = view_of(config)
    assert list(stale_settings(changed(config, **{"data.validation_prompts": ("a bird",)}), view, LATENTS, TEXT)) == []
    for field, value in PROMPTS.items():
        text = value if isinstance(value, str) else value[0]
        (line,) = stale_settings(changed(config, **{field: value}), view, LATENTS, TEXT)
        assert line.startswith(f"view clips: {field}: {text!r} is not in it; run `precog precompute`")


WEIGHTS = {"vae": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    fill_cache(write_experiment("5b", folder))
    return folder


@pytest.fixture
def experiment(original: Path, tmp_path: Path) -> tuple[Path, Config]:
    folder = tmp_path / "experiment"
    shutil.copytree(original, folder)
    return folder, write_experiment("5b", folder, max_train_steps=1)


def test_marks_in_the_view_spare_training_the_hashing_of_encoders(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_experiment("5b", original)
    view = read_view(LocalStorage(config.precompute.cache), "two")
    for name in WEIGHTS:
        part = present_part(config.model, name)
        assert part is not None and part.marks == view.encoders[name]
    monkeypatch.setattr("shared.model.pretrained.sha256_files", None)
    open_run(config)


def another_vae(folder: Path) -> None:
    build_vae("5b", seed=1).save_pretrained(folder / "model/vae")


def another_t5(folder: Path) -> None:
    build_text_encoder(seed=1).save_pretrained(folder / "model/text_encoder")


def another_tokenizer(folder: Path) -> None:
    file = folder / "model/tokenizer/tokenizer.json"
    file.write_bytes(file.read_bytes() + b"\n")


def another_scaling_factor(folder: Path) -> None:
    file = folder / "model/vae/config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"scaling_factor": 1.5}), "utf-8")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (another_vae, r"view two: the cache was made with another VAE than .*: the weights differ; run `precog"),
        (another_t5, r"view two: the cache was made with another T5 than .*: the weights differ; run `precog"),
        (another_tokenizer, r"view two: the cache was made with another tokenizer than .*: tokenizer.json differs"),
        (another_scaling_factor, r"another VAE than .*: scaling_factor was 0.7, is 1.5; run `precog precompute`"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_cache_of_another_encoder_is_refused(
    change: Callable[[Path], None], line: str, experiment: tuple[Path, Config]
) -> None:
    folder, config = experiment
    change(folder)
    with pytest.raises(CacheError, match=line):
        open_run(config)


def test_other_times_and_missing_encoders_leave_the_view_valid(experiment: tuple[Path, Config]) -> None:
    folder, config = experiment
    weights = [folder / "model" / name / file for name, file in WEIGHTS.items()]
    for file in weights:
        os.utime(file, ns=(1, 1))
    open_run(config)
    weights[0].unlink()  # an incomplete download
    open_run(config)
    for name in (*WEIGHTS, "tokenizer"):
        shutil.rmtree(folder / "model" / name)
    open_run(config)

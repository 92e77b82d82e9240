"""Which fields of the config a view depends on, and which it does not."""

from pathlib import Path
from typing import Any

import pytest

from shared.cache.collection import Collection
from shared.cache.settings import shaping_settings, stale_settings
from shared.cache.view import View
from shared.config import Config, Data, Precompute

CHANGES: dict[str, Any] = {
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
    "precompute.text_quantization": "int8",
    "precompute.vae_dtype": "fp16",
}
PROMPTS = {"data.negative_prompt": "blurry", "data.validation_prompts": ("a dog",)}
PLACES = {
    "data.dataset_config_name": "small",
    "data.dataset_name": "clips.csv",
    "data.instance_data_root": Path("elsewhere"),
    "data.name": "other",
    "precompute.cache": "s3://elsewhere/cache",
}
WORK = {
    "precompute.clips_per_shard",
    "precompute.decode_deadline_seconds",
    "precompute.decode_memory_gib",
    "precompute.decode_workers",
    "precompute.decoder",
    "precompute.device",
    "precompute.local_cache_gib",
    "precompute.prompts_per_shard",
    "precompute.remember_files",
    "precompute.retry_skipped",
    "precompute.text_batch_size",
    "precompute.vae_batch_size",
}
"""How stage 1 works, which leaves no trace in what it makes."""
LATENTS: dict[str, Any] = {"precision": "fp32", "image_conditions": None}
IMAGE_LATENTS: dict[str, Any] = {"precision": "fp32", "image_conditions": {"noised": 4}}
TEXT: dict[str, Any] = {"precision": "bf16"}


@pytest.fixture
def config() -> Config:
    return Config.model_validate(
        {
            "model": {"pretrained_model_name_or_path": "tiny"},
            "data": {
                "name": "clips",
                "instance_data_root": "clips",
                "frame_buckets": [9, 17],
                "resolution_buckets": [[32, 48]],
                "validation_prompts": ["a rabbit", "a bird"],
            },
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


def test_every_field_of_data_and_precompute_is_compared_or_known_not_to_matter() -> None:
    fields = {f"{table}.{name}" for table, kind in TABLES.items() for name in kind.model_fields}
    assert fields == CHANGES.keys() | PROMPTS.keys() | PLACES.keys() | WORK | {"precompute.noised_image_count"}


TABLES = {"data": Data, "precompute": Precompute}


def test_the_config_that_made_the_view_fits_it(config: Config) -> None:
    assert list(stale_settings(config, view_of(config), LATENTS, TEXT)) == []


@pytest.mark.parametrize("field", CHANGES)
def test_a_changed_field_is_named_with_both_values_and_the_cure(field: str, config: Config) -> None:
    other = changed(config, **{"data.height": 64, "data.width": 64} if field in ("data.height", "data.width") else {})
    (line,) = stale_settings(changed(other, **{field: CHANGES[field]}), view_of(other), LATENTS, TEXT)
    named = {"data.height": "data.resolution_buckets", "data.width": "data.resolution_buckets"}
    named["data.max_num_frames"] = "data.frame_buckets"
    assert line.startswith(f"view clips: made with other settings than this config's: {named.get(field, field)} was ")
    assert ", is " in line and "run `precog precompute` with this config" in line


def test_several_changes_are_one_line(config: Config) -> None:
    other = changed(config, **{"data.fps": 16.0, "precompute.enable_tiling": True})
    (line,) = stale_settings(other, view_of(config), LATENTS, TEXT)
    assert "data.fps was 8.0, is 16.0, precompute.enable_tiling was False, is True; run `precog" in line


@pytest.mark.parametrize("field", PLACES)
def test_a_cache_may_move(field: str, config: Config) -> None:
    assert list(stale_settings(changed(config, **{field: PLACES[field]}), view_of(config), LATENTS, TEXT)) == []


@pytest.mark.parametrize(("field", "precision"), [("precompute.vae_dtype", "fp32"), ("precompute.text_dtype", "bf16")])
def test_the_precision_that_auto_came_to_may_be_written_out(field: str, precision: str, config: Config) -> None:
    assert list(stale_settings(changed(config, **{field: precision}), view_of(config), LATENTS, TEXT)) == []


def test_a_bucket_that_no_clip_can_take_does_not_matter(config: Config) -> None:
    other = changed(config, **{"data.frame_buckets": (17, 9, 81)})
    assert list(stale_settings(other, view_of(config), LATENTS, TEXT)) == []


def test_the_number_of_noised_images_matters_to_image_to_video_alone(config: Config) -> None:
    other = changed(config, **{"precompute.noised_image_count": 1})
    assert list(stale_settings(other, view_of(config), LATENTS, TEXT)) == []
    (line,) = stale_settings(other, view_of(config, image_to_video=True), IMAGE_LATENTS, TEXT)
    assert "precompute.noised_image_count was 4, is 1" in line


def test_fewer_validation_prompts_are_there_and_others_are_not(config: Config) -> None:
    view = view_of(config)
    assert list(stale_settings(changed(config, **{"data.validation_prompts": ("a bird",)}), view, LATENTS, TEXT)) == []
    for field, value in PROMPTS.items():
        text = value if isinstance(value, str) else value[0]
        (line,) = stale_settings(changed(config, **{field: value}), view, LATENTS, TEXT)
        assert line.startswith(f"view clips: {field}: {text!r} is not in it; run `precog precompute`")

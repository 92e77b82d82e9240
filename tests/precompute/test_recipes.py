"""Keys: everything that changes a stored byte is in one, and nothing else is."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from precompute import pixels
from precompute.recipes import (
    crop_seed,
    find_encoders,
    latent_key,
    latents_recipe,
    prompt_key,
    prompts_recipe,
)
from precompute.windows import Window
from shared.config import Config
from shared.errors import UsageError
from shared.fingerprint import key_of
from shared.model.geometry import Bucket
from tests.corpus import config_for
from tests.tiny import save_pipeline

WINDOW = Window((0, 2, 4, 6, 8), (0, 80_000, 160_000, 240_000, 320_000), Bucket(5, 16, 32), False)


@pytest.fixture(scope="module")
def image_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline("5b-i2v", tmp_path_factory.mktemp("pipeline") / "i2v")


def keys_of(config: Config) -> tuple[str, str]:
    """Keys of one window and one text."""
    encoders = find_encoders(config)
    latents, prompts = key_of(latents_recipe(config, encoders)), key_of(prompts_recipe(config, encoders))
    return latent_key("ab" * 32, WINDOW, config.data.video_reshape_mode, latents), prompt_key("a rabbit", prompts)


def test_recipes_have_all_that_shapes_the_bytes(
    image_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaving one out would take stored shards for others; a new one is a new cache."""
    config = config_for(image_pipeline, tmp_path, tmp_path / "cache")
    encoders = find_encoders(config)
    latents, prompts = latents_recipe(config, encoders), prompts_recipe(config, encoders)
    assert latents["image_conditions"] == {"noised": config.precompute.noised_image_count, "log_sigma": [-3.0, 0.5]}
    assert latents["format"] == prompts["format"] == 2
    assert (latents["kind"], latents["tf32"], latents["chunk_frames"]) == ("latents", False, 8)
    assert latents["transform"] == pixels.TRANSFORM
    assert (prompts["kind"], prompts["attention_mask"]) == ("prompts", False)
    assert sorted(latents) == [
        *("channels_last", "chunk_frames", "compiled", "format", "image_conditions", "kind", "precision", "slicing"),
        *("tf32", "tiling", "transform", "vae"),
    ]
    assert sorted(prompts) == [
        *("attention_mask", "format", "kind", "precision", "text_encoder", "text_length", "tokenizer")
    ]
    before = key_of(latents)
    monkeypatch.setattr(pixels, "TRANSFORM", "another")
    assert key_of(latents_recipe(config, encoders)) != before


def test_noised_images_are_part_of_image_to_video_keys_only(
    pipeline: Path, image_pipeline: Path, tmp_path: Path
) -> None:
    for folder, matters in ((pipeline, False), (image_pipeline, True)):
        few = keys_of(config_for(folder, tmp_path, "cache", noised_image_count=1))
        assert (few != keys_of(config_for(folder, tmp_path, "cache"))) is matters


def scale_weights(folder: Path, name: str) -> None:
    [weights] = (folder / name).glob("*.safetensors")
    tensors = load_file(weights)
    first = min(tensors)
    tensors[first] = tensors[first] * 1.5
    save_file(tensors, weights, {"format": "pt"})


def store_as(folder: Path, name: str, dtype: torch.dtype) -> None:
    [weights] = (folder / name).glob("*.safetensors")
    save_file({key: tensor.to(dtype) for key, tensor in load_file(weights).items()}, weights, {"format": "pt"})


def append_line(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")


@pytest.mark.parametrize(
    ("change", "latents", "prompts"),
    [
        (lambda folder: scale_weights(folder, "vae"), True, False),
        (lambda folder: scale_weights(folder, "text_encoder"), False, True),
        (lambda folder: edit(folder / "vae/config.json", '"norm_num_groups": 2', '"norm_num_groups": 1'), True, False),
        (lambda folder: edit(folder / "text_encoder/config.json", '"num_heads": 4', '"num_heads": 2'), False, True),
        (lambda folder: edit(folder / "transformer/config.json", 'seq_length": 16', 'seq_length": 12'), 0, 1),
        (lambda folder: append_line(folder / "tokenizer/tokenizer.json"), False, True),
        (lambda folder: (folder / "tokenizer/added_tokens.json").write_text('{"<clip>": 199}'), False, True),
        (lambda folder: append_line(folder / "tokenizer/tokenizer_config.json"), False, True),
        (lambda folder: (folder / "tokenizer/special_tokens_map.json").write_text('{"pad_token": "x"}'), False, True),
        (lambda folder: (folder / "vae/diffusion_pytorch_model.safetensors").touch(), False, False),
        (lambda folder: scale_weights(folder, "transformer"), False, False),
        (lambda folder: edit(folder / "vae/config.json", "_diffusers_version", "_name_or_path"), False, False),
        (lambda folder: edit(folder / "text_encoder/config.json", "transformers_version", "_name_or_path"), 0, 0),
        (lambda folder: (folder / "README.md").write_text("hello"), False, False),
    ],
)
def test_part_of_the_checkpoint_is_known_by_its_bytes(
    pipeline: Path, tmp_path: Path, change: Callable[[Path], object], latents: bool, prompts: bool
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(pipeline, folder)
    before = keys_of(config_for(folder, tmp_path, "cache"))
    change(folder)
    after = keys_of(config_for(folder, tmp_path, "cache"))
    assert (before[0] != after[0], before[1] != after[1]) == (bool(latents), bool(prompts))


def test_automatic_precision_of_t5_is_its_own(pipeline: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(pipeline, folder)
    config = config_for(folder, tmp_path, "cache")
    for own, other, named in ((torch.bfloat16, torch.float16, "bf16"), (torch.float16, torch.bfloat16, "fp16")):
        store_as(folder, "text_encoder", own)
        store_as(folder, "transformer", other)
        assert prompts_recipe(config, find_encoders(config))["precision"] == named


NEUTRAL: dict[str, dict[str, Any]] = {
    "data": {
        "name": "other",
        "instance_data_root": "elsewhere",
        "id_token": "TOKEN",  # it changes the captions and their keys, but not the key of this text
        "held_out_clips": 3,
        "windows_per_clip": 4,
        "frame_buckets": (5, 9),
        "resolution_buckets": ((16, 32), (32, 16)),
        "negative_prompt": "blurred",
    },
    "precompute": {"cache": "elsewhere", "vae_batch_size": 7, "text_batch_size": 3, "clips_per_shard": 5}
    | {"prompts_per_shard": 5, "decode_workers": 5, "decode_memory_gib": 7.0, "decoder": "pyav", "device": "cpu"}
    | {"local_cache_gib": 7.0, "retry_skipped": True, "remember_files": True, "text_offload": True},
    "train": {"lora_rank": 4},
}


def test_settings_that_shape_no_byte_keep_the_keys(pipeline: Path, tmp_path: Path) -> None:
    config = config_for(pipeline, tmp_path, "cache", device="auto")
    before = keys_of(config)
    for table, field, value in ((table, *change) for table, changes in NEUTRAL.items() for change in changes.items()):
        values = config.model_dump()
        values[table][field] = value
        other = Config.model_validate(values)
        assert other != config and keys_of(other) == before, field


def test_place_of_a_checkpoint_keeps_the_keys(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys_of(config_for(pipeline, tmp_path, "cache"))
    shutil.copytree(pipeline, tmp_path / "moved")
    for path in (tmp_path / "moved").rglob("*"):
        os.utime(path, (1, 1))
    monkeypatch.chdir(tmp_path)
    assert keys_of(config_for(Path("moved"), tmp_path, "cache")) == before


def test_every_part_of_a_window_is_part_of_its_key() -> None:
    keys = {latent_key("ab" * 32, WINDOW, "center", "r")}
    for other in (
        replace(WINDOW, indices=(0, 2, 4, 6, 9)),
        replace(WINDOW, timestamps_us=(0, 80_000, 160_000, 240_000, 320_001)),
        replace(WINDOW, bucket=Bucket(5, 32, 16)),
        replace(WINDOW, flip=True),
    ):
        keys.add(latent_key("ab" * 32, other, "center", "r"))
    keys |= {latent_key("cd" * 32, WINDOW, "center", "r"), latent_key("ab" * 32, WINDOW, "random", "r")}
    keys |= {latent_key("ab" * 32, WINDOW, "center", "s")}
    assert len(keys) == 8


def test_random_crop_depends_on_bytes_and_times() -> None:
    later = tuple(stamp + 400_000 for stamp in WINDOW.timestamps_us)
    seeds = {crop_seed("ab" * 32, WINDOW.timestamps_us), crop_seed("ab" * 32, later)}
    assert len(seeds | {crop_seed("cd" * 32, WINDOW.timestamps_us)}) == 3


def test_tokenizer_without_its_files_is_named(pipeline: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(pipeline, folder)
    for name in ("spiece.model", "tokenizer.json"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    with pytest.raises(UsageError, match=r"tokenizer: spiece\.model and tokenizer\.json not found"):
        find_encoders(config_for(folder, tmp_path, "cache"))

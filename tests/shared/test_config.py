"""The config's fields: what each shapes, which flags of the reference script each replaces, how errors read."""

import re
from pathlib import Path

import pytest

from shared.config import INSTEAD_OF_FLAG, TABLES, field_value, fields_shaping, recipe_fields
from shared.config_file import load_config
from shared.errors import UsageError

ROOT = Path(__file__).parents[2]
FLAGS = re.findall(
    r"\w+",
    """
adam_beta1 adam_beta2 adam_epsilon adam_weight_decay allow_tf32 cache_dir caption_column checkpointing_steps
checkpoints_total_limit dataloader_num_workers dataset_config_name dataset_name enable_slicing enable_tiling fps
gradient_accumulation_steps gradient_checkpointing guidance_scale height hub_model_id hub_token id_token
instance_data_root learning_rate logging_dir lora_alpha lr_num_cycles lr_power lr_scheduler lr_warmup_steps
max_grad_norm max_num_frames max_train_steps mixed_precision nccl_timeout noised_image_dropout num_train_epochs
num_validation_videos optimizer output_dir pretrained_model_name_or_path prodigy_beta3 prodigy_decouple
prodigy_safeguard_warmup prodigy_use_bias_correction push_to_hub random_flip rank report_to resume_from_checkpoint
revision scale_lr seed skip_frames_end skip_frames_start tracker_name train_batch_size use_8bit_adam use_dynamic_cfg
validation_epochs validation_images validation_prompt validation_prompt_separator variant video_column
video_reshape_mode width
""",
)
"""Of diffusers' train_cogvideox_lora.py and train_cogvideox_image_to_video_lora.py (58eb52c080)."""


def test_fields_of_recipes_views_and_runs_come_from_metadata() -> None:
    assert recipe_fields("prompts")["precision"] == "precompute.text_dtype"
    assert recipe_fields("latents")["tiling"] == "precompute.enable_tiling"
    assert {"data.fps", "data.random_flip"} <= set(fields_shaping("clips"))
    assert {"train.seed", "train.lora_rank", "memory.base_precision"} <= set(fields_shaping("run"))
    assert "train.learning_rate" not in fields_shaping("run", "resolved_by_run")


def test_field_value_is_as_json_has_it() -> None:
    config = load_config(ROOT / "configs" / "demo.toml", ["data.resolution_buckets=[[64,96]]"])
    assert field_value(config, "data.resolution_buckets") == [[64, 96]]


def test_every_flag_is_a_field_or_has_an_answer() -> None:
    fields = {name for table in TABLES.values() for name in table.model_fields}
    assert [flag for flag in FLAGS if (flag in fields) == (flag in INSTEAD_OF_FLAG)] == []
    assert INSTEAD_OF_FLAG.keys() <= set(FLAGS)
    named = re.findall(r"\b([a-z]+)\.(\w+)", " ".join(INSTEAD_OF_FLAG.values()))
    assert all(field in TABLES[table].model_fields for table, field in named)


@pytest.mark.parametrize("table", ["model", "train"])
@pytest.mark.parametrize(
    ("flag", "advice"),
    [
        ("rank", "use train.lora_rank"),
        ("use_8bit_adam", "use train.optimizer = 'adamw8bit'"),
        ("train_batch_size", "use train.global_batch_size and train.max_tokens_per_pack"),
        ("scale_lr", "train.learning_rate is used as it is"),
    ],
)
def test_flag_without_a_field_is_refused_with_advice(table: str, flag: str, advice: str) -> None:
    line = f"^override '{table}.{flag}=1': unknown key {table}.{flag}; {re.escape(advice)}$"
    with pytest.raises(UsageError, match=line):
        load_config(ROOT / "configs" / "demo.toml", [f"{table}.{flag}=1"])


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.shuffle_shards=0", "train.shuffle_shards = 0: should be 'auto' or 'all', or greater than 0"),
        ("memory.stream_weights=1", "memory.stream_weights = 1: should be 'auto' or 0, or greater than or equal to 2"),
        ("data.frame_buckets=[9,0]", "data.frame_buckets.1 = 0: should be greater than 0"),
        ("trian.seed=1", "unknown table trian; did you mean train?"),
    ],
)
def test_wrong_value_is_answered_with_the_range(override: str, line: str) -> None:
    with pytest.raises(UsageError) as raised:
        load_config(ROOT / "configs" / "demo.toml", [override])
    assert str(raised.value) == f"override {override!r}: {line}"


def test_mixed_precision_no_is_fp32() -> None:
    config = load_config(ROOT / "configs" / "demo.toml", ["train.mixed_precision=no"])
    assert config.train.mixed_precision == "fp32"

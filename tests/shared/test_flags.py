"""Every flag of the reference scripts is a field of the same name, or is refused with what to do instead."""

import re
from pathlib import Path

import pytest

from shared.config import Config, load_config
from shared.errors import UsageError
from shared.flags import INSTEAD

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


def test_every_flag_is_a_field_or_has_an_answer() -> None:
    fields = {name for table in Config.model_fields.values() for name in table.annotation.model_fields}
    assert [flag for flag in FLAGS if (flag in fields) == (flag in INSTEAD)] == []
    assert INSTEAD.keys() <= set(FLAGS)


def test_the_readme_has_every_flag_in_its_table() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("| flag there | field here |")[2]
    written = re.findall(r"--([a-z0-9_]+\*?)", table.partition("\n\n")[0])
    patterns = [name.replace("*", ".*") for name in written] + ["skip_frames_end"]
    assert [flag for flag in FLAGS if not any(re.fullmatch(pattern, flag) for pattern in patterns)] == []


@pytest.mark.parametrize("table", ["model", "data", "train"])
@pytest.mark.parametrize("flag", INSTEAD)
def test_a_flag_that_is_no_field_is_refused_with_what_to_do_instead(table: str, flag: str) -> None:
    line = f"^override '{table}.{flag}=1': unknown key {table}.{flag}; {re.escape(INSTEAD[flag])}$"
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
def test_what_a_field_may_be_is_said_in_one_line(override: str, line: str) -> None:
    with pytest.raises(UsageError) as raised:
        load_config(ROOT / "configs" / "demo.toml", [override])
    assert str(raised.value) == f"override {override!r}: {line}"


def test_the_reference_scripts_word_for_fp32_is_understood() -> None:
    config = load_config(ROOT / "configs" / "demo.toml", ["train.mixed_precision=no"])
    assert config.train.mixed_precision == "fp32"

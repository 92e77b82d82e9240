"""The config's fields: what each shapes, which flags of the reference script each replaces, how errors read."""

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from shared.config import INSTEAD_OF_FLAG, TABLES, field_value, fields_shaping, recipe_fields
from shared.config_file import load_config
from shared.errors import UsageError

DEMO = Path(__file__).parents[2] / "configs" / "demo.toml"
FLAGS = re.findall(r"\S+", """
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
""")  # fmt: skip
"""Of diffusers' train_cogvideox_lora.py and train_cogvideox_image_to_video_lora.py (58eb52c080)."""


def test_fields_of_recipes_views_and_runs_come_from_metadata() -> None:
    assert recipe_fields("prompts")["precision"] == "precompute.text_dtype"
    assert recipe_fields("latents")["tiling"] == "precompute.enable_tiling"
    assert {"data.fps", "data.random_flip"} <= set(fields_shaping("clips"))
    assert {"train.seed", "train.lora_rank", "memory.base_precision"} <= set(fields_shaping("run"))
    assert "train.learning_rate" not in fields_shaping("run", "resolved_by_run")


def test_rank_auto_is_that_of_the_initial_adapter(tmp_path: Path) -> None:
    for name, ranks in (("one", (6, 6)), ("two", (6, 4))):
        sides = {
            f"transformer.{layer}.lora_A.weight": np.zeros((rank, 8)) for layer, rank in zip("ab", ranks, strict=True)
        }
        save_file(sides, tmp_path / f"{name}.safetensors")

    def rank(name: str) -> int:
        path = tmp_path / f"{name}.safetensors"
        return load_config(DEMO, ["train.lora_rank=auto", f"train.initial_adapter={path}"]).train.lora_rank

    assert rank("one") == 6
    with pytest.raises(UsageError, match=r"two\.safetensors': expected a LoRA of one rank, got ranks \[4, 6\]"):
        rank("two")
    with pytest.raises(UsageError, match=r"none\.safetensors': cannot be read as a LoRA"):
        rank("none")
    with pytest.raises(UsageError, match=r"train\.lora_rank = 'auto': needs train\.initial_adapter"):
        load_config(DEMO, ["train.lora_rank=auto"])


def test_every_flag_is_a_field_or_has_an_answer() -> None:
    fields = {name for table in TABLES.values() for name in table.model_fields}
    assert [flag for flag in FLAGS if (flag in fields) == (flag in INSTEAD_OF_FLAG)] == []
    assert INSTEAD_OF_FLAG.keys() <= set(FLAGS)
    named = re.findall(r"\b([a-z]+)\.(\w+)", " ".join(INSTEAD_OF_FLAG.values()))
    assert all(field in TABLES[table].model_fields for table, field in named)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.shuffle_shards=0", "train.shuffle_shards = 0: should be 'auto' or 'all', or greater than 0"),
        ("memory.stream_weights=1", "memory.stream_weights = 1: should be 'auto' or 0, or greater than or equal to 2"),
        ("data.frame_buckets=[9,0]", "data.frame_buckets.1 = 0: should be greater than 0"),
        (
            "precompute.decode_memory_gib=1025",
            "precompute.decode_memory_gib = 1025: should be less than or equal to 1024",
        ),
        ("trian.seed=1", "unknown table trian; did you mean train?"),
        ("model.rank=1", "unknown key model.rank; use train.lora_rank"),
        ("train.use_8bit_adam=1", "unknown key train.use_8bit_adam; use train.optimizer = 'adamw8bit'"),
    ],
)
def test_wrong_value_or_key_is_answered_with_what_is_right(override: str, line: str) -> None:
    with pytest.raises(UsageError) as raised:
        load_config(DEMO, [override])
    assert str(raised.value) == f"override {override!r}: {line}"


def test_frame_buckets_that_the_vae_changes_name_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"frame_buckets has 13, .*; use 9 or 17, or set data\.allow_uneven_frame_bu"):
        load_config(DEMO, ["data.frame_buckets=[9,13]"])
    uneven = ["data.frame_buckets=[13]", "data.allow_uneven_frame_buckets=true"]
    assert load_config(DEMO, uneven).data.frame_buckets == (13,)


def test_numbers_are_finite() -> None:
    fields = [(f"{table}.{name}", field) for table, kind in TABLES.items() for name, field in kind.model_fields.items()]
    for name in [name for name, field in fields if "float" in str(field.annotation)]:
        for value in ("inf", "nan"):
            with pytest.raises(UsageError, match=rf"override '{name}={value}': {name} = {value}: should be "):
                load_config(DEMO, [f"{name}={value}"])


NAMES = re.findall(r"\S+", """
model.pretrained_model_name_or_path model.revision model.variant model.model_cache_dir data.name
data.instance_data_root data.dataset_name data.dataset_config_name data.caption_column data.video_column
precompute.cache train.output_dir train.initial_adapter train.resume_from_checkpoint train.tracker_name
sample.output_dir sample.prompts_file sample.video
""")  # fmt: skip


def test_empty_names_and_paths_are_refused() -> None:
    for field in NAMES:
        with pytest.raises(UsageError, match=rf"override '{field}= ': {field} = ' ': (String )?should "):
            load_config(DEMO, [f"{field}= "])


def test_only_devices_that_we_run_on_are_accepted() -> None:
    load_config(DEMO, ["precompute.device=cuda:15", "train.device=cuda", "sample.device=cpu"])
    for field in ("precompute.device", "train.device", "sample.device"):
        for device in ("mps", "cuda:", "cuda:200", "cpu:0", ""):
            with pytest.raises(UsageError, match=rf"{field} = '{device}': should be '?auto'?, '?cpu'?"):
                load_config(DEMO, [f"{field}={device}"])


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["data.name=x", "data.frame_buckets=[99]"], "override 'data.frame_buckets=[99]': data: every one of frame_b"),
        (
            ["data.frame_buckets=[99]", "data.name=x", "data.max_num_frames=50"],
            "overrides 'data.frame_buckets=[99]', 'data.max_num_frames=50': data: every one of frame_buckets",
        ),
        (["data.name=x", "data.width=64"], "override 'data.width=64': data: height and width are set together"),
        (["train.seed=-1", "train.seed=-2"], "override 'train.seed=-2': train.seed = -2: should be greater"),
        (["dat.name=x", "data.name=x"], "override 'dat.name=x': unknown table dat; did you mean data?"),
    ],
)
def test_an_error_names_the_override_that_it_comes_from(overrides: list[str], line: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(line)}"):
        load_config(DEMO, overrides)


def test_an_error_of_the_files_own_names_no_override(tmp_path: Path) -> None:
    source = DEMO.read_text(encoding="utf-8")
    # some editors begin a file with a byte order mark
    (tmp_path / "config.toml").write_text(source.replace("fps = 0", "width = 64\nfps = 0"), encoding="utf-8-sig")
    with pytest.raises(UsageError, match=r"^\S+config.toml:6: data: height and width are set together"):
        load_config(tmp_path / "config.toml", ["data.name=x", "data.fps=8"])


@pytest.mark.parametrize("field", ["precompute.cache", "data.validation_prompts", "data.x"])
@pytest.mark.parametrize(
    ("value", "secret"),
    [
        ("s3://{}@bucket/cache", "ID:wJalr/XUtn+FEMI"),
        ("ftp://user:{}@host/x", "hunter2x"),
        ("https://{}@host/x", "plaintoken"),
        ("https://host/x?a=1&sig={}", "abcdef"),
        ("{}", "0123456789abcdef0123456789abcdef01234567"),
        ("{}", "AKIA" + "A" * 16),
        ("{}", "hf_" + "a" * 30),
        ("{}", "sk-" + "a1B2" * 8),
    ],
)
def test_secrets_are_refused_in_every_text_field(field: str, value: str, secret: str) -> None:
    text = value.format(secret)
    with pytest.raises(UsageError) as caught:
        load_config(DEMO, [f"{field}={[text] if field.endswith('prompts') else text}"])
    assert secret not in str(caught.value)
    with pytest.raises(UsageError, match="write it as") as caught:
        load_config(DEMO, [f"token={text}"])
    assert secret not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        "s3://bucket/a:b@c",
        "sftp://me@host/cache",
        "http://127.0.0.1:8000/x@y",
        "a/snapshots/0123456789abcdef0123456789abcdef01234567/x",
        "mail me@home: 10:30",
    ],
)
def test_names_that_only_look_like_secrets_are_taken(value: str) -> None:
    assert load_config(DEMO, [f"precompute.cache={value}"]).precompute.cache == value
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert load_config(DEMO, [f"model.revision='{commit}'"]).model.revision == commit


def test_home_is_expanded_in_every_path_and_in_no_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    single = [f"data.{name}" for name in ("instance_data_root", "dataset_name")]
    single += [f"model.{name}" for name in ("pretrained_model_name_or_path", "model_cache_dir")]
    single += [f"train.{name}" for name in ("output_dir", "initial_adapter", "resume_from_checkpoint")]
    single += ["precompute.cache", "sample.output_dir", "sample.video"]
    config = load_config(DEMO, [*(f"{name}=~/x" for name in single), "sample.images=['~/x']"])
    home = str(tmp_path / "x")
    assert [str(field_value(config, name)) for name in single] == [home] * len(single)
    assert config.sample.images == (tmp_path / "x",)
    assert load_config(DEMO, ["precompute.cache=s3://b/~/x"]).precompute.cache == "s3://b/~/x"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.resolution_buckets=64x96,96x64", ((64, 96), (96, 64))),
        ("data.resolution_buckets=[64x96, '96X64']", ((64, 96), (96, 64))),
        ("data.resolution_buckets=[[64,96]]", ((64, 96),)),
        ("data.frame_buckets=9", (9,)),
        ("data.frame_buckets=9,17", (9, 17)),
        ("train.lora_target_modules=to_q,to_k", ("to_q", "to_k")),
        ("data.validation_prompts=a dog, red", ("a dog, red",)),
        ("train.learning_rate=2e-5", 2e-5),
        ("train.mixed_precision=no", "fp32"),
    ],
)
def test_values_are_toml_and_a_list_needs_no_brackets(override: str, expected: object) -> None:
    table, _, field = override.partition("=")[0].partition(".")
    assert getattr(getattr(load_config(DEMO, [override]), table), field) == expected

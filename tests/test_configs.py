"""Every config in configs/ loads, is saved unchanged, and fits its checkpoint."""

import re
from pathlib import Path

import pytest

from shared.config import Config
from shared.config_file import load_config, save_config
from shared.errors import UsageError
from shared.model.conventions import read_conventions, refusal
from shared.model.geometry import Bucket
from tests.tiny import scheduler_config, transformer_config, vae_config

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
PUBLISHED_GRIDS = {"2b": (60, 90, 49), "5b": (60, 90, 49), "5b-i2v": (60, 90, 49)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_survives_saving(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    save_config(config, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml") == config


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem != "demo"], ids=lambda path: path.stem)
def test_the_buckets_of_a_config_suit_its_checkpoint(path: Path) -> None:
    transformer = transformer_config(path.stem)
    if path.stem in PUBLISHED_GRIDS:
        names = ("sample_height", "sample_width", "sample_frames")
        transformer |= dict(zip(names, PUBLISHED_GRIDS[path.stem], strict=True))
    conventions = read_conventions(transformer, vae_config(path.stem), scheduler_config(path.stem))
    data = load_config(path).data
    for frames in data.frame_buckets:
        for height, width in data.resolutions:
            assert refusal(conventions, Bucket(frames, height, width)) is None


def test_no_two_configs_write_the_same_view_of_a_cache() -> None:
    configs = [load_config(path) for path in CONFIGS]
    views = [(config.precompute.cache, config.data.name) for config in configs]
    assert len(set(views)) == len(views)


def test_overrides_are_toml_values_and_bare_words_are_text() -> None:
    config = load_config(ROOT / "configs" / "demo.toml", ["train.learning_rate=2e-5", "data.name=other", "data.fps=0"])
    assert (config.train.learning_rate, config.data.name, config.data.fps) == (2e-5, "other", 0)


FLOATS = [
    f"{table}.{name}"
    for table, kind in Config.model_fields.items()
    for name, field in getattr(kind.annotation, "model_fields").items()  # noqa: B009
    if "float" in str(field.annotation)
]


@pytest.mark.parametrize("field", FLOATS)
def test_a_number_is_finite(field: str) -> None:
    for value in ("inf", "-inf", "nan"):
        with pytest.raises(UsageError, match=rf"override '{field}={value}': {field} = {value}: should be "):
            load_config(ROOT / "configs" / "demo.toml", [f"{field}={value}"])


@pytest.mark.parametrize(
    ("field", "most"), [("precompute.decode_deadline_seconds", 86_400), ("precompute.decode_memory_gib", 1024)]
)
def test_a_limit_that_the_kernel_would_not_take_is_refused(field: str, most: int) -> None:
    load_config(ROOT / "configs" / "demo.toml", [f"{field}={most}"])
    with pytest.raises(UsageError, match=rf"{field} = .* should be less than or equal to {most}$"):
        load_config(ROOT / "configs" / "demo.toml", [f"{field}={most + 1}"])


NAMES = re.findall(
    r"\S+",
    """
model.pretrained_model_name_or_path model.revision model.variant model.model_cache_dir
data.name data.instance_data_root data.dataset_name data.dataset_config_name data.caption_column data.video_column
precompute.cache train.output_dir train.initial_adapter train.resume_from_checkpoint train.tracker_name
sample.output_dir sample.lora
""",
)


@pytest.mark.parametrize("field", NAMES)
def test_an_empty_name_or_path_is_refused(field: str) -> None:
    for value in ("", " "):
        with pytest.raises(UsageError, match=rf"override '{field}={value}': {field} = '{value}': (String )?should "):
            load_config(ROOT / "configs" / "demo.toml", [f"{field}={value}"])


@pytest.mark.parametrize("field", ["precompute.device", "train.device", "sample.device"])
def test_only_a_device_that_we_run_on_is_accepted(field: str) -> None:
    for device in ("auto", "cpu", "cuda"):
        load_config(ROOT / "configs" / "demo.toml", [f"{field}={device}"])
    for device in ("meta", "mps", "nonsense", "cuda:", "cuda:-1", "cuda:200", "cpu:0", ""):
        with pytest.raises(UsageError, match=rf"{field} = '{device}': should be '?auto'?, '?cpu'?"):
            load_config(ROOT / "configs" / "demo.toml", [f"{field}={device}"])


@pytest.mark.parametrize("field", ["precompute.device", "sample.device"])
def test_one_gpu_of_several_may_be_named(field: str) -> None:
    for device in ("cuda:0", "cuda:1", "cuda:15"):
        load_config(ROOT / "configs" / "demo.toml", [f"{field}={device}"])


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
        load_config(ROOT / "configs" / "demo.toml", overrides)


def test_an_error_of_the_files_own_names_no_override(tmp_path: Path) -> None:
    source = (ROOT / "configs" / "demo.toml").read_text(encoding="utf-8")
    (tmp_path / "config.toml").write_text(source.replace("fps = 0", "width = 64\nfps = 0"), encoding="utf-8")
    with pytest.raises(UsageError, match=r"^\S+config.toml:5: data: height and width are set together"):
        load_config(tmp_path / "config.toml", ["data.name=x", "data.fps=8"])


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    source = (ROOT / "configs" / "demo.toml").read_text(encoding="utf-8")
    (tmp_path / "config.toml").write_text(source, encoding="utf-8-sig")
    assert load_config(tmp_path / "config.toml") == load_config(ROOT / "configs" / "demo.toml")


def test_a_token_is_refused_wherever_it_is_put() -> None:
    secret = "hf_" + "a" * 30
    with pytest.raises(UsageError, match="looks like an access token") as caught:
        load_config(ROOT / "configs" / "demo.toml", [f"model.revision={secret}"])
    assert secret not in str(caught.value)


@pytest.mark.parametrize("override", ["hub_token={}", "model.a.b={}", "{}"])
def test_a_malformed_override_does_not_repeat_a_token(override: str) -> None:
    secret = "hf_" + "b" * 30
    with pytest.raises(UsageError, match="write it as") as caught:
        load_config(ROOT / "configs" / "demo.toml", [override.format(secret)])
    assert secret not in str(caught.value)

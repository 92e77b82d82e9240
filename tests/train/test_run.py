"""What a run is made of before its first step, and what is refused there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from shared.cache.storage import LocalStorage
from shared.cache.view import read_view, write_view
from shared.config import Config
from shared.errors import CacheError, DataError
from tests.experiments import fill_cache, write_experiment
from train.open_run import open_run


def test_a_view_without_training_clips_is_one_line(tmp_path: Path) -> None:
    config = write_experiment("2b", tmp_path)
    fill_cache(config)
    storage = LocalStorage(config.precompute.cache)
    view = read_view(storage, "two")
    write_view(storage, replace(view, rows=tuple(replace(row, split="held_out") for row in view.rows)))
    with pytest.raises(DataError, match="the view has no training clips; check its table"):
        open_run(config)


@pytest.mark.parametrize(
    ("table", "values", "line"),
    [
        ("data", {"fps": 4.0}, r"data\.fps was 0\.0, is 4\.0"),
        ("data", {"frame_buckets": (9,)}, r"data\.frame_buckets was \[9, 17\], is \[9\]"),
        ("data", {"id_token": "BW"}, r"data\.id_token was '', is 'BW'"),
        ("precompute", {"enable_tiling": True}, r"precompute\.enable_tiling was False, is True"),
        ("precompute", {"vae_dtype": "bf16"}, r"precompute\.vae_dtype was 'auto', is 'bf16'"),
        ("data", {"validation_prompts": ("a dog",)}, "data.validation_prompts: 'a dog' is not in it"),
    ],
)
def test_a_view_of_another_config_is_refused_before_training(
    table: str, values: dict[str, object], line: str, experiment: Config
) -> None:
    changed = experiment.model_copy(update={table: getattr(experiment, table).model_copy(update=values)})
    with pytest.raises(CacheError, match=rf"view clips: .*{line}.*; run `precog precompute` with this config"):
        open_run(changed)
    open_run(experiment)


def test_a_view_of_the_first_version_is_refused_until_precompute_ran_again(tmp_path: Path) -> None:
    config = write_experiment("2b", tmp_path)
    fill_cache(config)
    file = tmp_path / "cache/datasets/two.json"
    about = json.loads(file.read_bytes())
    file.write_text(json.dumps({name: value for name, value in about.items() if name != "settings"}), "utf-8")
    with pytest.raises(CacheError, match="two: damaged view"):
        open_run(config)
    fill_cache(config)
    open_run(config)

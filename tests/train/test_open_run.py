"""Refusals before the first step; `test_dry_run.py` has those of a broken cache or checkpoint."""

from dataclasses import replace
from pathlib import Path

import pytest

from shared.cache.storage import LocalStorage
from shared.cache.view import read_view, write_view
from shared.config import Config
from shared.errors import CacheError, DataError
from tests.experiments import fill_cache, write_experiment
from train.open_run import open_run


def test_a_view_without_training_clips_is_refused(tmp_path: Path) -> None:
    config = write_experiment("2b", tmp_path)
    fill_cache(config)
    storage = LocalStorage(config.precompute.cache)
    view = read_view(storage, "two")
    write_view(storage, replace(view, rows=tuple(replace(row, split="held_out") for row in view.rows)))
    with pytest.raises(DataError, match="the view has no training clips; check its skipped clips"):
        open_run(config)


@pytest.mark.parametrize(
    ("table", "values", "line"),
    [
        ("data", {"frame_buckets": (9,)}, r"data\.frame_buckets was \[9, 17\], is \[9\]"),
        ("precompute", {"vae_dtype": "bf16"}, r"precompute\.vae_dtype was 'auto', is 'bf16'"),
        ("data", {"validation_prompts": ("a dog",)}, r"data\.validation_prompts: .*a dog"),
    ],
)
def test_a_view_of_another_config_is_refused(
    table: str, values: dict[str, object], line: str, experiment: Config
) -> None:
    changed = experiment.model_copy(update={table: getattr(experiment, table).model_copy(update=values)})
    with pytest.raises(CacheError, match=rf"view clips: .*{line}.*; run `precog precompute` with this config"):
        open_run(changed)

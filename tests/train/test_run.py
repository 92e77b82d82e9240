"""What a run is made of before its first step, and what is refused there."""

from pathlib import Path

import pytest

from shared.errors import DataError
from tests.experiments import fill_cache, write_experiment
from train.run import open_run


def test_a_view_without_training_clips_is_one_line(tmp_path: Path) -> None:
    config = write_experiment("2b", tmp_path)
    config = config.model_copy(update={"data": config.data.model_copy(update={"held_out_clips": 2})})
    with pytest.raises(DataError, match="no clip is left to train on"):
        fill_cache(config)
    with pytest.raises(DataError, match="the view has no training clips; check its table"):
        open_run(config)

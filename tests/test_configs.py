"""Every config in configs/ loads, is saved unchanged, and fits its checkpoint."""

from pathlib import Path

import pytest

from shared.config_file import load_config, save_config
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


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if not path.stem.startswith("demo")], ids=lambda path: path.stem
)
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

"""A cache that is filled once; each test gets a copy."""

import shutil
from pathlib import Path

import pytest

from tests.corpus import config_for, run, write_corpus

Filled = tuple[Path, Path]


@pytest.fixture(scope="session")
def filled_once(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Path:
    """Fill a cache with six clips."""
    folder = tmp_path_factory.mktemp("filled")
    run(config_for(pipeline, write_corpus(folder / "clips", 6), folder / "cache"))
    return folder


@pytest.fixture
def filled(filled_once: Path, tmp_path: Path) -> Filled:
    """Copy the six clips and their cache."""
    shutil.copytree(filled_once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "clips", tmp_path / "cache"

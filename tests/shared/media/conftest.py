"""One folder of bar-coded clips for all test modules."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the folder in which `media.clip` keeps its clips."""
    return tmp_path_factory.mktemp("clips")

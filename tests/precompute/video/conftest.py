"""One folder of bar-coded clips for all test modules."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which `media.clip` keeps what it has written."""
    return tmp_path_factory.mktemp("clips")

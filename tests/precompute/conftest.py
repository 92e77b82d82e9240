"""One tiny pipeline on disk for all tests of stage 1."""

from pathlib import Path

import pytest

from tests.tiny import save_pipeline


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 2B layout; tests that change a file copy it first."""
    return save_pipeline("2b", tmp_path_factory.mktemp("pipeline") / "2b")

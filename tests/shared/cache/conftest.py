"""An empty cache for each test."""

from pathlib import Path

import pytest

from shared.cache.storage import LocalStorage


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path / "cache"))

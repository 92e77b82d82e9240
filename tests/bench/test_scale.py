"""Test that the benchmark of growing data sets runs in its smallest form; its figures are not tested."""

import json
import sys
from pathlib import Path

import pytest

from bench import record, scale


@pytest.mark.faults
def test_scale_writes_its_samples_and_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(
        sys, "argv", ["bench", "--few", "3", "--many", "8", "--rounds", "1", "--only", "growth", "read"]
    )
    scale.main()
    found = json.loads((tmp_path / "results" / "scale.json").read_text())
    assert found["growth"].keys() == scale.COMMANDS.keys() and found["read"]["median_ms"]["ours"] > 0
    assert (tmp_path / "results" / "scale.md").read_text().count("|") > 12

"""Tests that the CPU benchmarks run in their smallest form; their figures are not tested."""

import json
import sys
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

import pytest

from bench import cpu_memory, cpu_precompute, cpu_train, record
from shared.config import Config


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.mark.faults
@pytest.mark.parametrize(
    ("bench", "arguments"),
    [(cpu_memory, ["--pairs", "2"]), (cpu_precompute, ["--clips", "2", "--rounds", "1"]), (cpu_train, [])],
)
def test_each_writes_its_samples_and_a_table(
    bench: ModuleType, arguments: list[str], results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    monkeypatch.setattr(cpu_train, "SIZES", [replace(cpu_train.SIZES[0], starts=1, rounds=2, steps=1)])
    bench.main()
    [written] = results.glob("*.json")
    found = json.loads(written.read_text())
    assert found["circumstances"]["versions"]["torch"] and len(found) > 1
    assert written.with_suffix(".md").read_text().count("|") > 20


@pytest.mark.faults
def test_an_arm_that_dies_ends_the_benchmark(tmp_path: Path) -> None:
    with pytest.raises(EOFError):
        cpu_train.Worker(dies, cpu_train.make_config(tmp_path), "ours")


def dies(config: Config, pipe: Connection) -> None:
    raise SystemExit(1)


def test_an_interval_is_wide_where_starts_differ() -> None:
    alike = record.interval([[1.0, 1.1, 0.9, 1.0]] * 4)
    apart = record.interval([[start] * 4 for start in (0.8, 0.9, 1.1, 1.2)])
    assert alike["low"] <= alike["median"] == 1.0 <= alike["high"]
    assert apart["high"] - apart["low"] > 2 * (alike["high"] - alike["low"])

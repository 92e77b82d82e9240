"""The record of versions and devices: complete, and part of no shared file."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from precompute import provenance
from tests.corpus import config_for, run, stored_files, write_corpus


def records(cache: Path) -> dict[str, list[dict[str, Any]]]:
    """Return recipe -> the environments that encoded for it."""
    return {
        folder.name: [json.loads(path.read_bytes()) for path in sorted(folder.iterdir())]
        for folder in (cache / "made_by").iterdir()
    }


def test_each_environment_is_recorded_once_per_recipe(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, cache = write_corpus(tmp_path / "clips", 2), tmp_path / "cache"
    run(config_for(pipeline, root, cache))
    run(config_for(pipeline, root, cache))
    recipes = {path.parent.name for path in cache.glob("*/*/recipe.json")}
    assert len(recipes) == 2 and records(cache).keys() == recipes
    for [made_by] in records(cache).values():
        assert made_by["versions"]["torch"] == version("torch")
        assert {"diffusers", "transformers", "av", "python"} <= made_by["versions"].keys()
        assert made_by["device"]["name"]

    other = tmp_path / "other"
    monkeypatch.setattr(provenance, "version", lambda name: f"{name} 9.9")
    run(config_for(pipeline, root, other))
    assert stored_files(other) == stored_files(cache)
    assert [made_by["versions"]["torch"] for [made_by] in records(other).values()] == ["torch 9.9"] * 2

    run(config_for(pipeline, root, cache))
    assert sum(map(len, records(cache).values())) == 2, "nothing was encoded: there is nothing to record"
    run(config_for(pipeline, write_corpus(tmp_path / "more", 3), cache))
    assert sum(map(len, records(cache).values())) == 4

"""Damaged and misplaced files: never read silently, always named by `verify`, and made again after `--repair`."""

import dataclasses
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shared.cache.collection import SampleReader, read_recipe
from shared.cache.storage import LocalStorage
from shared.cache.verify import verify
from shared.cache.view import View, read_table_name, read_view, write_view
from shared.errors import CacheError
from tests.faults import damage
from tests.faults.writer import COLLECTION, SAMPLES, SKIPPED, write_all

Damage = Callable[[Path, random.Random], Path]


def changed(root: Path, draws: random.Random) -> Path:
    """Damage one of the files below a folder."""
    return damage.changed([path for path in sorted(root.rglob("*.*")) if path.is_file()], draws)


def view_changed(root: Path, draws: random.Random) -> Path:
    """Change one of the view's two files, or give it the content of another view's."""
    if draws.randrange(4):
        return root / "datasets" / changed(root / "datasets", draws).name
    storage = LocalStorage(str(root))
    view = read_view(storage, "power")
    write_view(storage, dataclasses.replace(view, name="other", rows=tuple(view.rows)[: draws.randrange(1, 9)]))
    if draws.randrange(2):
        names = [f"datasets/{name}.json" for name in ("other", "power")]
    else:
        names = [read_table_name(storage, f"datasets/{name}.json") for name in ("other", "power")]
    shutil.copyfile(root / names[0], root / names[1])
    return root / names[1]


def misplaced(root: Path, draws: random.Random) -> Path:
    """Give a file the content of another one."""
    path, other = draws.sample([path for path in sorted(root.rglob("*")) if path.is_file()], 2)
    shutil.copyfile(other, path)
    return path


def read_all(root: Path, view: View) -> bool:
    """Read the view and its samples; return whether a `CacheError` refuses one, and fail for any other difference."""
    storage = LocalStorage(str(root))
    refused = False
    try:
        assert read_view(storage, view.name) == view
        read_recipe(storage, COLLECTION)
        reader = SampleReader(storage, COLLECTION)
    except CacheError:
        return True
    for key, sample in SAMPLES.items():
        try:
            if key != SKIPPED:
                assert torch.equal(reader.read(key)["moments"], sample.tensors["moments"])
        except CacheError:
            refused = True
    return refused


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip real fsyncs."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.parametrize(
    ("damaged", "trials"),
    [
        (changed, 20),
        (misplaced, 15),
        (view_changed, 10),
        pytest.param(changed, 3000, marks=pytest.mark.faults),
        pytest.param(misplaced, 300, marks=pytest.mark.faults),
        pytest.param(view_changed, 500, marks=pytest.mark.faults),
    ],
)
def test_damage_is_refused_named_and_repaired(tmp_path: Path, damaged: Damage, trials: int) -> None:
    write_all(tmp_path / "whole")
    view, refusals = read_view(LocalStorage(str(tmp_path / "whole")), "power"), 0
    assert not read_all(tmp_path / "whole", view)
    for trial in range(trials):
        root = tmp_path / "cache"
        shutil.copytree(tmp_path / "whole", root)
        path = damaged(root, random.Random(trial))
        is_changed = path.read_bytes() != (tmp_path / "whole" / path.relative_to(root)).read_bytes()
        refused = read_all(root, view)
        storage = LocalStorage(str(root))
        lines = verify(storage, repair=True)[1]
        assert lines or not refused, f"trial {trial}: verify misses {path}"
        assert lines or not is_changed or path.suffix == ".json", f"trial {trial}: verify misses {path}"
        write_all(root)
        assert not read_all(root, view) and verify(storage, repair=False)[1] == [], f"trial {trial}: {path} stays"
        refusals += refused
        shutil.rmtree(root)
    assert refusals > trials // 4

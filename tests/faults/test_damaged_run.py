"""Damaged files of a run: a checkpoint or an export is used as it was written, or refused in one line."""

import hashlib
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sample.loras import Lora, load_lora
from shared import console
from shared.config import Config
from shared.errors import PrecogError
from shared.fingerprint import canonical_json, sealed, unsealed
from shared.run_folder import ADAPTER, EXPORT
from shared.signals import StopSignal
from tests.experiments import changed as with_values
from tests.faults.damage import changed
from tests.tiny import build_pipeline
from tests.train.saved import same_bits
from train.checkpoint.files import COMMIT, IDENTITY, STATE, load_checkpoint, save_checkpoint
from train.checkpoint.resume import find_start
from train.export import read_adapter
from train.loop import train
from train.open_run import open_run
from train.run import Run
from train.state import TrainState

NEWEST, OLDER, OTHER = "checkpoint-000004", "checkpoint-000002", "other"


@pytest.fixture(scope="module")
def run(experiment: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Open a run of four steps with two checkpoints; `other/` has one of another seed."""
    folder = tmp_path_factory.mktemp("damaged") / "run"
    config = with_values(experiment, train={"output_dir": folder, "max_train_steps": 4, "checkpointing_steps": 2})
    train(config, StopSignal())
    found = load_checkpoint(folder / NEWEST)
    state = {**found.state, IDENTITY: {**found.state[IDENTITY], "train.seed": 1}}
    save_checkpoint(folder / OTHER, 4, {**found.tensors, "adapter": found.tensors["optimizer"]}, state)
    return open_run(config)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def without_a_field(path: Path, draws: random.Random) -> None:
    """Remove a field of the state, or a file, from a checkpoint that stays sealed."""
    commit, state = unsealed((path / COMMIT).read_bytes()), json.loads((path / STATE).read_bytes())
    fields: list[tuple[dict[str, Any], str]] = [(commit["files"], name) for name in commit["files"] if name != STATE]
    tables = [table for table in (state, *state.values()) if isinstance(table, dict)]
    fields += [(table, name) for table in tables for name in table if table[name] is not None]  # None means missing
    table, name = draws.choice(fields)
    del table[name]
    (path / STATE).write_bytes(content := canonical_json(state))
    commit["files"][STATE] = hashlib.sha256(content).hexdigest()
    (path / COMMIT).write_bytes(sealed(commit))


def damage(folder: Path, draws: random.Random) -> None:
    """Change, remove or exchange a file of a checkpoint, exchange checkpoints, or leave out a sealed field."""
    kind, path = draws.choice(["change", "change", "remove", "take", "move", "lack"]), folder / NEWEST
    if draws.random() < 0.2:
        shutil.rmtree(folder / OLDER)
    if kind == "change":
        changed(sorted(folder.glob("checkpoint-*/*")), draws)
    elif kind == "remove":
        draws.choice(sorted(path.iterdir())).unlink()
    elif kind == "take":
        taken = draws.choice([*sorted(folder.glob(f"{OLDER}/*")), *sorted(folder.glob(f"{OTHER}/*/*"))])
        shutil.copyfile(taken, path / taken.name)
    elif kind == "move":
        shutil.rmtree(path)
        shutil.copytree(draws.choice([*folder.glob(OLDER), *folder.glob(f"{OTHER}/*")]), path)
    else:
        without_a_field(path, draws)


@pytest.mark.parametrize("trials", [30, pytest.param(1000, marks=pytest.mark.faults)])
def test_damaged_checkpoint_is_never_resumed(
    run: Run, trials: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, ends = run.config.train.output_dir, {"refused": 0, "older": 0}
    lines: list[str] = []
    monkeypatch.setattr(console, "say", lines.append)
    for trial in range(trials):
        folder = tmp_path / str(trial)
        shutil.copytree(whole, folder)
        damage(folder, random.Random(trial))
        lines.clear()
        here = replace(run, config=with_values(run.config, train={"output_dir": folder}))
        try:
            state = TrainState(here, find_start(here))
        except PrecogError as error:
            assert str(folder) in str(error) and "\n" not in str(error), trial
            ends["refused"] += 1
        else:
            name = f"checkpoint-{state.step:06}"
            assert files_of(folder / name) == files_of(whole / name), f"trial {trial}: resumed from a damaged one"
            assert same_bits(state.tensors(), load_checkpoint(whole / name).tensors)
            assert len(lines) == (name == OLDER) and all(NEWEST in line and "\n" not in line for line in lines), trial
            ends["older"] += name == OLDER
        shutil.rmtree(folder)
    assert min(ends.values()) > trials // 10, ends


@pytest.mark.parametrize("trials", [30, pytest.param(600, marks=pytest.mark.faults)])
def test_flipped_bit_of_an_export_is_refused(run: Run, trials: int, tmp_path: Path) -> None:
    """Half of the bits in the header; as `train.initial_adapter` and by `precog sample`."""
    whole, path = (run.config.train.output_dir / EXPORT / ADAPTER).read_bytes(), tmp_path / ADAPTER
    pipeline = build_pipeline("2b")
    header, draws = 8 + int.from_bytes(whole[:8], "little"), random.Random(0)
    for trial in range(trials):
        position = draws.randrange(*((0, header) if trial % 2 else (header, len(whole))))
        flipped = bytearray(whole)
        flipped[position] ^= 1 << draws.randrange(8)
        path.write_bytes(flipped)
        for read in (
            lambda: read_adapter(run.transformer, run.config.train, path),
            lambda: load_lora(pipeline, Lora("", "lora", path, path, 1.0, "")),
        ):
            with pytest.raises(PrecogError) as error:
                read()
            assert str(path) in str(error.value) and "\n" not in str(error.value), position

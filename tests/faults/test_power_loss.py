"""Power losses: from every state that the disk may be in, a rerun ends in the undisturbed cache or run.

One stage-1 write (recipe, assignment, shards, receipts, view) is recorded effect by effect, and replayed by `disk`; so
is a training run.
"""

import json
import os
import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from shared import console
from shared.cache.collection import SampleReader
from shared.cache.storage import LocalStorage
from shared.cache.view import read_view, view_names
from shared.config import Config
from shared.config_file import dump_config, load_config
from shared.errors import CacheError
from shared.run_folder import read_metrics
from shared.signals import StopSignal
from tests.corpus import config_for, run, stored_files, write_corpus
from tests.experiments import changed
from tests.faults.disk import EMPTY, Log, State, crash_states, crashed, insecure, states_after
from tests.faults.writer import COLLECTION, SAMPLES, write_all
from train.checkpoint.files import latest_checkpoint
from train.loop import train
from train.metrics import Metrics

Files = dict[str, bytes]


def wrong_reads(root: Path) -> list[str]:
    """Return the keys whose sample is read with other values than were written; an error is right."""
    storage = LocalStorage(str(root))
    wrong = []
    try:
        reader = SampleReader(storage, COLLECTION)
    except CacheError:
        return []
    for key, sample in SAMPLES.items():
        try:
            tensors = reader.read(key)
        except CacheError:
            continue
        wrong += [key] if not torch.equal(tensors["moments"], sample.tensors["moments"]) else []
    for name in view_names(storage):
        try:
            wrong += [name] if len(read_view(storage, name).split("train")) != len(SAMPLES) - 1 else []
        except CacheError:
            continue
    return wrong


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("undisturbed")
    write_all(root)
    return stored_files(root)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip real fsyncs: the states are computed."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def recorded(root: Path, ignored: tuple[str, ...] = (), before: State = EMPTY) -> Log:
    before.write(root)
    with Log(root, ignored) as log:
        write_all(root)
    return log


@dataclass
class Ends:
    """Numbers of crash states and of their bad ends."""

    states: int = 0
    wrong_reads: int = 0
    wrong_ends: int = 0
    """Reruns that failed or ended in another cache."""


def replay(states: Iterable[State], folder: Path, undisturbed: Files) -> Ends:
    """Rerun on every state."""
    tally = Ends()
    for state in states:
        root = folder / str(tally.states)
        state.write(root)
        tally.states += 1
        tally.wrong_reads += bool(wrong_reads(root))
        try:
            write_all(root)
            tally.wrong_ends += stored_files(root) != undisturbed
        except CacheError:
            tally.wrong_ends += 1
    return tally


def test_rerun_after_a_power_loss_ends_in_the_same_cache(tmp_path: Path, undisturbed: Files) -> None:
    states = crash_states(recorded(tmp_path / "log"), 11, random.Random(0))
    tally = replay(states, tmp_path, undisturbed)
    assert (tally.wrong_reads, tally.wrong_ends) == (0, 0) and tally.states > 100


def test_finished_run_survives_a_power_loss(tmp_path: Path, undisturbed: Files) -> None:
    log = recorded(tmp_path / "log")
    names, contents = insecure(log, len(log.effects))
    assert contents == []
    crashed(log, len(log.effects), set(names), {}).write(tmp_path / "after")
    assert stored_files(tmp_path / "after") == undisturbed


def some(log: Log, draws: random.Random) -> list[State]:
    """Return enough states to show that a mutant is caught."""
    return draws.sample(list(crash_states(log, 5, draws)), 40)


@pytest.mark.parametrize("ignored", [("fsync",), ("fsync folder",)])
def test_missing_fsync_is_noticed_but_nothing_wrong_is_read(
    tmp_path: Path, undisturbed: Files, ignored: tuple[str, ...]
) -> None:
    """The replay finds the fault; on a disk that ignores fsync, hashes protect the reader."""
    log = recorded(tmp_path / "log", ignored)
    tally = replay(some(log, random.Random(1)), tmp_path, undisturbed)
    assert tally.wrong_reads == 0 and tally.wrong_ends > 0


def test_receipt_written_before_its_shard_is_noticed(
    tmp_path: Path, undisturbed: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_file = LocalStorage.publish_file
    waiting: list[tuple[str, bytes]] = []

    def receipt_first(storage: LocalStorage, temporary: Path, name: str, *, replace: bool = False) -> bool:
        if name.endswith(".tar") and not replace:
            waiting.append((name, temporary.read_bytes()))
            return True
        published = publish_file(storage, temporary, name, replace=replace)
        while waiting:
            storage.publish(*waiting.pop(), replace=True)
        return published

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "publish_file", receipt_first)
        log = recorded(tmp_path / "log")
    tally = replay(some(log, random.Random(3)), tmp_path, undisturbed)
    assert tally.wrong_ends > 0


@pytest.mark.faults
def test_rerun_after_thousands_of_power_losses_ends_in_the_same_cache(tmp_path: Path, undisturbed: Files) -> None:
    """Every prefix; then the reruns of some states are hit by a second loss."""
    draws = random.Random(5)
    states = list(crash_states(recorded(tmp_path / "log"), 1, draws))
    first = replay(states, tmp_path / "first", undisturbed)
    assert (first.wrong_reads, first.wrong_ends) == (0, 0) and first.states > 500
    for number, before in enumerate(draws.sample(states, 30)):
        log = recorded(tmp_path / f"log {number}", before=before)
        second = replay(crash_states(log, 3, draws, before), tmp_path / f"second {number}", undisturbed)
        assert (second.wrong_reads, second.wrong_ends) == (0, 0)
        first.states += second.states
    assert first.states > 2000


@pytest.mark.faults
def test_whole_stage_1_after_a_power_loss_is_finished(pipeline: Path, tmp_path: Path) -> None:
    """With decoders and encoders, so that the log has effects of two threads."""
    root, cache = write_corpus(tmp_path / "clips", 12), tmp_path / "cache"
    cache.mkdir()
    with Log(cache) as log:
        run(config_for(pipeline, root, cache))
    undisturbed, draws = stored_files(cache), random.Random(6)
    assert sum(effect.kind == "fsync" for effect in log.effects) > 10
    for number, state in enumerate(draws.sample(list(crash_states(log, 1, draws)), 25)):
        state.write(tmp_path / str(number))
        run(config_for(pipeline, root, tmp_path / str(number)))
        assert stored_files(tmp_path / str(number)) == undisturbed


# Training


@dataclass(frozen=True)
class Trained:
    """A run of six steps with three checkpoints, two evaluations and an export, recorded."""

    config: Config
    log: Log
    files: Files
    """See `run_files`."""

    def after(self, state: State) -> Path:
        """Write the state in place of the run, and return the run's folder."""
        shutil.rmtree(self.log.root)
        state.write(self.log.root)
        return self.config.train.output_dir


def run_files(run: Path) -> Files:
    """Return the files of a run that its owner keeps; metrics without times."""
    names = ("export/pytorch_lora_weights.safetensors", "export/best/pytorch_lora_weights.safetensors")
    found = {name: (run / name).read_bytes() for name in names} | {
        "config": dump_config(load_config(run / "config.toml")).encode()
    }
    steps = [{name: step[name] for name in ("step", "loss", "ema_loss")} for step in read_metrics(run)]
    return found | {"metrics.jsonl": json.dumps([steps, read_metrics(run)[-1]["held_out_loss"]]).encode()}


@pytest.fixture(scope="module")
def trained(experiment: Config, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    values = {"output_dir": root / "run", "max_train_steps": 6, "checkpointing_steps": 2, "validation_steps": 3}
    config = changed(experiment, train=values | {"checkpoints_total_limit": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        with Log(root) as log:
            train(config, StopSignal())
    return Trained(config, log, run_files(root / "run"))


def test_finished_training_survives_a_power_loss(trained: Trained) -> None:
    states = set(states_after(trained.log, len(trained.log.effects), random.Random(7)))
    assert len(states) > 5
    for folder in map(trained.after, states):
        assert run_files(folder) == trained.files
        found = latest_checkpoint(folder, report=pytest.fail)
        assert found is not None and found.step == 6


def last_durable_step(log: Log, count: int) -> int:
    """Return the step of the newest checkpoint whose name is secured after `count` effects; 0 if there is none."""
    lost = insecure(log, count)[0]
    names = [log.effects[number].target for number in range(count) if number not in lost]
    return max((int(name[-6:]) for name in names if name.startswith("run/checkpoint-")), default=0)


@pytest.mark.parametrize(
    ("every", "resumed"), [(21, 1), pytest.param(1, 40, marks=pytest.mark.faults)], ids=["some", "all"]
)
def test_training_resumes_after_a_power_loss(
    trained: Trained, every: int, resumed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the newest whole checkpoint, with the line of every step before it; then to the same export."""
    draws, lines, states = random.Random(8), list[str](), list[State]()
    monkeypatch.setattr(console, "say", lines.append)
    for count in range(len(trained.log.effects), -1, -every):
        for state in states_after(trained.log, count, draws):
            states.append(state)
            folder = trained.after(state)
            found = latest_checkpoint(folder, report=lines.append)
            step = found.step if found else 0
            assert step >= last_durable_step(trained.log, count)
            if found:
                Metrics(folder, step, 6)
            assert lines == []
    for folder in map(trained.after, draws.sample(states, resumed)):
        train(trained.config, StopSignal())
        assert run_files(folder) == trained.files

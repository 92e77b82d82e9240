"""Checkpoints come back bit for bit; damage and interruptions are never silent."""

import hashlib
import io
import os
import random
import shutil
import signal
import warnings
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import CacheError
from shared.fingerprint import sealed
from tests.train.saved import FILES, is_content, names, same_bits, save, silence
from train.checkpoint.files import (
    COMMIT,
    STATE,
    latest_checkpoint,
    load_checkpoint,
    load_state,
    prune_checkpoints,
    save_checkpoint,
)


def temporaries(run: Path) -> list[Path]:
    return list(run.glob(".tmp-*"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


# What is saved comes back


def test_a_checkpoint_comes_back_bit_for_bit(run: Path) -> None:
    groups = {
        "adapter": {
            "nan": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
            "bf16": torch.randn(4, 3).to(torch.bfloat16),
            "float64": torch.randn(2, 2, dtype=torch.float64),
            "transposed": torch.arange(6.0).reshape(2, 3).T,
            "scalar": torch.tensor(7, dtype=torch.int64),
            "empty": torch.zeros(0, 4),
            "parameter": torch.nn.Parameter(torch.randn(3)),
        },
        "optimizer": {},
    }
    state: dict[str, Any] = {
        "float": 0.1 + 0.2,
        "tiny": 5e-324,
        "nested": {"list": [1, None, True, "æ—✓\n"]},
        "large": 2**63,
        "identity": {},
        "base": {"sha256": "", "marks": []},
    }
    path = save_checkpoint(run, 20, groups, state)
    assert path == run / "checkpoint-000020"
    found = load_checkpoint(path)
    assert (found.path, found.step, found.state) == (path, 20, state)
    assert same_bits(found.tensors, groups)
    assert load_state(path) == state
    assert temporaries(run) == []


def test_a_damaged_checkpoint_of_the_step_is_replaced(run: Path) -> None:
    path = save(run, 20)
    (path / COMMIT).write_bytes(b"")
    assert is_content(load_checkpoint(save(run, 20)), 20)
    assert (names(run), temporaries(run)) == ([path.name], [])


# Damage


def latest_after_damage(run: Path, file: str) -> None:
    """Check that the newest is refused in one line that names the file, and the one before it is used."""
    lines: list[str] = []
    assert is_content(latest_checkpoint(run, report=lines.append), 10)
    (line,) = lines
    assert line.startswith(f"{run / 'checkpoint-000020' / file}: damaged checkpoint (")
    assert line.endswith("resuming from checkpoint-000010") and "\n" not in line


@pytest.mark.parametrize("file", FILES)
def test_a_changed_file_is_refused(run: Path, file: str) -> None:
    older = save(run, 10)
    path = save(run, 20) / file
    whole, draws = path.read_bytes(), random.Random(file)
    lengths = [0, 1, 7, 8, 9, len(whole) - 1, *draws.sample(range(len(whole)), 5)]
    others = [(older / file).read_bytes(), path.with_name(FILES[FILES.index(file) - 1]).read_bytes()]
    changed = [*(whole[:length] for length in lengths), whole + b"\n", whole + bytes(512), whole + whole, *others]
    for position in draws.sample(range(8 * len(whole)), 20):
        flipped = bytearray(whole)
        flipped[position // 8] ^= 1 << position % 8
        changed.append(bytes(flipped))
    for content in changed:
        path.write_bytes(content)
        latest_after_damage(run, file)
    path.unlink()
    latest_after_damage(run, file)
    for make in (os.mkfifo, os.mkdir):
        make(path)
        latest_after_damage(run, file)
        (path.unlink if make is os.mkfifo else path.rmdir)()
    (run / "elsewhere").write_bytes(whole)
    path.symlink_to(run / "elsewhere")
    latest_after_damage(run, file)
    path.unlink()
    path.write_bytes(whole)
    assert is_content(latest_checkpoint(run, report=silence), 20)


def test_a_renamed_checkpoint_is_refused(run: Path) -> None:
    save(run, 10).rename(run / "checkpoint-000030")
    with pytest.raises(CacheError, match=r"COMMIT\.json: damaged checkpoint \(belongs to step 10\)"):
        load_checkpoint(run / "checkpoint-000030")


def test_all_damaged_is_an_error_that_names_each(run: Path) -> None:
    (save(run, 10) / COMMIT).unlink()
    (save(run, 20) / "adapter.safetensors").write_bytes(b"")
    with pytest.raises(CacheError) as caught:
        latest_checkpoint(run, report=silence)
    line = str(caught.value)
    for part in ("checkpoint-000010/COMMIT.json", "No such file", "checkpoint-000020/adapter.safetensors", "(0 bytes"):
        assert part in line
    assert "\n" not in line


SOUND = b'{"base":{"marks":[],"sha256":""},"identity":{}}'


def forge(path: Path, contents: dict[str, bytes], **changes: Any) -> None:
    """Write a checkpoint with right hashes and wrong content."""
    path.mkdir(parents=True)
    for name, data in contents.items():
        (path / name).write_bytes(data)
    files = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    (path / COMMIT).write_bytes(sealed({"files": files, "format": 1, "step": 20, **changes}))


@pytest.mark.parametrize(
    ("contents", "changes", "line"),
    [
        ({STATE: b"[1]"}, {}, "not a JSON object"),
        ({STATE: SOUND.replace(b"marks", b"mark")}, {}, "not a JSON object with identity and base"),
        ({STATE: SOUND}, {}, "lists no adapter or no optimizer"),
        ({STATE: b"[" * 100_000}, {}, "not a JSON object"),
        ({"adapter.safetensors": b""}, {}, "lists other files"),
        ({STATE: SOUND, "a.safetensors": (2**40).to_bytes(8, "little")}, {}, "not valid safetensors"),
        ({STATE: b"{}", "a.pkl": b"cos\nsystem\n."}, {}, "lists other files"),
        ({STATE: b"{}"}, {"format": 2}, "expected format 1, got 2"),
        ({STATE: b"{}"}, {"step": 30}, "belongs to step 30"),
        ({STATE: b"{}"}, {"files": [STATE]}, "lists other files"),
        ({STATE: b"{}"}, {"files": {STATE: "", "../a.safetensors": ""}}, "lists other files"),
        ({STATE: b"{}"}, {"files": {STATE: 2}}, "sha256 is not the one"),
    ],
)
def test_a_forged_checkpoint_is_refused(
    run: Path, contents: dict[str, bytes], changes: dict[str, Any], line: str
) -> None:
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    sound = len(header).to_bytes(8, "little") + header + bytes(4)
    groups = {f"{name}.safetensors": sound for name in ("adapter", "optimizer")}
    forge(run / "checkpoint-000010", {STATE: SOUND, **groups}, step=10)
    found = load_checkpoint(run / "checkpoint-000010")
    assert found.tensors["adapter"]["a"].tolist() == [0], "the forgery itself is sound"
    forge(run / "checkpoint-000020", contents, **changes)
    with pytest.raises(CacheError, match=line):
        load_checkpoint(run / "checkpoint-000020")


# Interruptions


class Halves:
    """A file that lets a failure come between two halves of a write."""

    def __init__(self, file: Any, effect: Callable[[], None]) -> None:
        self.file, self.effect = file, effect

    def __enter__(self) -> "Halves":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: bytes) -> None:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.effect()
        self.file.write(data[len(data) // 2 :])


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Run `work` in a fork that SIGKILLs itself before its `number`-th change of the file system, writes split in two.

    Return False if it ended before that.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child starts no threads and never returns
        child = os.fork()
    if child == 0:
        left, plain_open = number, io.open

        def effect() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*args: Any, **keywords: Any) -> Any:
                effect()
                return call(*args, **keywords)

            return wrapper

        def opened(file: Any, mode: str = "r", *args: Any, **keywords: Any) -> Any:
            if "x" not in mode:
                return plain_open(file, mode, *args, **keywords)
            effect()
            return Halves(plain_open(file, mode, *args, **keywords), effect)

        try:
            for name in ("mkdir", "rename", "fsync", "unlink", "rmdir"):
                setattr(os, name, counted(getattr(os, name)))
            io.open = opened
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
    return status != 0


@pytest.mark.parametrize("damaged", [False, True])
def test_a_kill_at_any_effect_leaves_a_whole_checkpoint(tmp_path: Path, damaged: bool) -> None:
    """The third checkpoint, which removes the first, or replaces a damaged one of its step."""
    prepared, folder = tmp_path / "prepared", tmp_path / "run"
    save(prepared, 10)
    save(prepared, 20)
    if damaged:
        (save(prepared, 30) / STATE).write_bytes(b"")

    def work() -> None:
        prune_checkpoints(folder, 2, save(folder, 30))

    for number in count(1):
        shutil.copytree(prepared, folder)
        killed = killed_at(number, work)
        found = latest_checkpoint(folder, report=(lambda _: None) if damaged else silence)
        assert is_content(found, 20) or is_content(found, 30)
        if not killed:
            break
        work()  # the same command again
        assert is_content(latest_checkpoint(folder, report=silence), 30)
        shutil.rmtree(folder)
    assert number > 12


def test_files_and_folders_are_synced_around_the_rename(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def fsync(descriptor: int) -> None:
        order.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    def rename(source: Path, target: Path) -> None:
        order.append(f"rename to {target.name}")
        plain_rename(source, target)

    plain_rename = os.rename
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    save(run, 20)
    temporary = order[4]
    assert temporary.startswith(".tmp-")
    assert sorted(order[:3]) == sorted(FILES[1:])
    assert order[3:6] == [COMMIT, temporary, "rename to checkpoint-000020"]
    assert set(order[6:]) == {"run"}


# Retention


@pytest.mark.parametrize(("keep", "left"), [(1, [40, 50]), (3, [30, 40, 50]), (9, [10, 20, 30, 40, 50])])
def test_pruning_keeps_the_newest_at_least_two_and_other_files(run: Path, keep: int, left: list[int]) -> None:
    others = ["checkpoint-20", "checkpoint-best", "metrics.jsonl", "xcheckpoint-000001"]
    for name in others:
        (run / name).mkdir(parents=True)
    for step in (10, 20, 30, 40, 50):
        saved = save(run, step)
    prune_checkpoints(run, keep, saved)
    assert names(run) == sorted([*(f"checkpoint-{step:06d}" for step in left), *others])
    assert temporaries(run) == []


def test_pruning_counts_only_intact_checkpoints(run: Path) -> None:
    for step in (10, 20, 30, 40):
        saved = save(run, step)
    (run / "checkpoint-000040" / "adapter.safetensors").unlink()
    (run / "checkpoint-000020" / STATE).write_bytes(b"{}")
    prune_checkpoints(run, 2, saved)
    assert names(run) == [f"checkpoint-{step:06d}" for step in (10, 20, 30, 40)]
    prune_checkpoints(run, 2, save(run, 50))
    assert names(run) == [f"checkpoint-{step:06d}" for step in (30, 40, 50)]


def test_folders_of_killed_runs_are_deleted_and_files_stay(run: Path) -> None:
    saved, old, page = save(run, 10), run / ".tmp-old", run / ".tmp-report.html"
    old.mkdir()
    (old / "adapter.safetensors").write_bytes(b"half")
    page.write_bytes(b"being written by another process")
    prune_checkpoints(run, 2, saved)
    assert temporaries(run) == [page]

"""Checkpoints come back bit for bit; damage and interruptions are never silent."""

import errno
import hashlib
import io
import os
import random
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import CacheError, PrecogError
from shared.fingerprint import sealed
from tests.train.saved import FILES, is_content, names, same_bits, save, silence
from train.checkpoint.files import (
    COMMIT,
    PROCESS_START_SECONDS,
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
    }
    path = save_checkpoint(run, 20, groups, state)
    assert path == run / "checkpoint-000020"
    found = load_checkpoint(path)
    assert (found.path, found.step, found.state) == (path, 20, state)
    assert same_bits(found.tensors, groups)
    assert load_state(path) == state
    assert temporaries(run) == []


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_of_the_step_is_replaced(run: Path, name: str) -> None:
    path = save(run, 20)
    (path / name).write_bytes(b"")
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
def test_a_flipped_bit_in_any_file_is_refused(run: Path, file: str) -> None:
    save(run, 10)
    path = save(run, 20) / file
    whole = path.read_bytes()
    for position in random.Random(file).sample(range(8 * len(whole)), 20):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        latest_after_damage(run, file)
    path.write_bytes(whole)
    assert is_content(latest_checkpoint(run, report=silence), 20)


@pytest.mark.parametrize("file", FILES)
def test_a_truncated_or_longer_file_is_refused(run: Path, file: str) -> None:
    save(run, 10)
    path = save(run, 20) / file
    whole = path.read_bytes()
    lengths = {0, 1, 7, 8, 9, len(whole) - 1, *random.Random(file).sample(range(len(whole)), 5)}
    for damaged in [*(whole[:length] for length in lengths), whole + b"\n", whole + bytes(512), whole + whole]:
        path.write_bytes(damaged)
        latest_after_damage(run, file)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["missing", "folder", "link", "pipe", "older", "other file"])
def test_a_missing_or_replaced_file_is_refused(run: Path, file: str, kind: str) -> None:
    older = save(run, 10)
    path = save(run, 20) / file
    whole = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        (run / "elsewhere").write_bytes(whole)
        path.symlink_to(run / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "older":
        shutil.copy(older / file, path)
    elif kind == "other file":
        shutil.copy(path.with_name(FILES[FILES.index(file) - 1]), path)
    latest_after_damage(run, file)


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


def forge(path: Path, contents: dict[str, bytes], **changes: Any) -> None:
    """Write a checkpoint with right hashes and wrong content."""
    path.mkdir(parents=True)
    for name, data in contents.items():
        (path / name).write_bytes(data)
    files = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    (path / COMMIT).write_bytes(sealed({"files": files, "format": 1, "step": 20, **changes}))


HEADER = (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4))


@pytest.mark.parametrize(
    ("contents", "changes", "line"),
    [
        ({STATE: b"[1]"}, {}, "not a JSON object"),
        ({STATE: b"[" * 100_000}, {}, "not a JSON object"),
        ({"adapter.safetensors": b""}, {}, "lists other files"),
        ({STATE: b"{}", "a.safetensors": (2**40).to_bytes(8, "little")}, {}, "not valid safetensors"),
        ({STATE: b"{}", "a.safetensors": (60).to_bytes(8, "little") + HEADER[0]}, {}, "not valid safetensors"),
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
    forge(run / "checkpoint-000020", contents, **changes)
    with pytest.raises(CacheError, match=line):
        load_checkpoint(run / "checkpoint-000020")


def test_the_forgery_itself_is_sound(run: Path) -> None:
    forge(
        run / "checkpoint-000020",
        {STATE: b"{}", "a.safetensors": len(HEADER[0]).to_bytes(8, "little") + b"".join(HEADER)},
    )
    assert load_checkpoint(run / "checkpoint-000020").tensors["a"]["a"].tolist() == [0]


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


@contextmanager
def at_effect(number: int, act: Callable[[], None], deletes: bool) -> Iterator[Callable[[], int]]:
    """Call `act` before the `number`-th change of the file system, writes split in two; yields the count so far."""
    seen = count(1)
    last = 0

    def effect() -> None:
        nonlocal last
        last = next(seen)
        if last == number:
            act()

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

    plain_open = io.open
    with pytest.MonkeyPatch.context() as patch:
        for name in ("mkdir", "rename", "fsync", *(("unlink", "rmdir") if deletes else ())):
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(io, "open", opened)
        yield lambda: last


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Run `work` in a forked process that SIGKILLs itself at its `number`-th effect; False if it ended before that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child starts no threads and never returns
        child = os.fork()
    if child == 0:
        try:
            with at_effect(number, lambda: os.kill(os.getpid(), signal.SIGKILL), deletes=True):
                work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
    return status != 0


def before_first(run: Path) -> None:
    run.mkdir()


def before_third(run: Path) -> None:
    save(run, 10)
    save(run, 20)


def before_replacing_a_damaged_one(run: Path) -> None:
    save(run, 20)
    (save(run, 30) / STATE).write_bytes(b"")


CASES: dict[str, tuple[Callable[[Path], None], list[tuple[int, int]], int]] = {
    # preparation, the (step, variant) that may be found beside the new one, effects at least
    "first": (before_first, [], 12),
    "third and prune": (before_third, [(20, 0)], 12),
    "a damaged one": (before_replacing_a_damaged_one, [(20, 0)], 12),
}


@pytest.mark.parametrize("case", CASES)
def test_a_kill_at_any_effect_leaves_a_whole_checkpoint(tmp_path: Path, case: str) -> None:
    prepare, found_before, effects = CASES[case]
    prepared, folder = tmp_path / "prepared", tmp_path / "run"
    prepare(prepared)

    def work() -> None:
        prune_checkpoints(folder, 2, save(folder, 30))

    for number in count(1):
        shutil.copytree(prepared, folder)
        killed = killed_at(number, work)
        found = latest_checkpoint(folder, report=silence if case != "a damaged one" else lambda _: None)
        if found is None:
            assert case == "first"
        else:
            assert any(is_content(found, *one) for one in [(30, 0), *found_before])
        if not killed:
            break
        work()  # the same command again
        assert is_content(latest_checkpoint(folder, report=silence), 30)
        shutil.rmtree(folder)
    assert number > effects


def test_a_full_disk_at_any_effect_keeps_the_old_checkpoints(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before_third(tmp_path / "prepared")
    for number in count(1):
        run = tmp_path / str(number)
        shutil.copytree(tmp_path / "prepared", run)
        with at_effect(number, fail, deletes=False) as effects:
            try:
                save(run, 30)
            except PrecogError as error:
                assert str(error) == (
                    f"{run}/checkpoint-000030: cannot be saved (No space left on device); "
                    "older checkpoints are kept, free the disk and resume"
                )
        assert temporaries(run) == []
        assert is_content(load_checkpoint(run / "checkpoint-000010"), 10)
        assert is_content(load_checkpoint(run / "checkpoint-000020"), 20)
        found = latest_checkpoint(run, report=silence)
        assert found is not None
        assert is_content(found, 20) or is_content(found, 30)
        if effects() < number:
            assert is_content(found, 30)
            break
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


@pytest.mark.parametrize(("keep", "left"), [(1, [40, 50]), (2, [40, 50]), (3, [30, 40, 50]), (9, [10, 20, 30, 40, 50])])
def test_pruning_keeps_the_newest_and_at_least_two(run: Path, keep: int, left: list[int]) -> None:
    for step in (10, 20, 30, 40, 50):
        saved = save(run, step)
    prune_checkpoints(run, keep, saved)
    assert names(run) == [f"checkpoint-{step:06d}" for step in left]
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


def test_only_old_temporary_folders_are_deleted(run: Path) -> None:
    saved = save(run, 10)
    young, old = run / ".tmp-young", run / ".tmp-old"
    for folder in (young, old):
        folder.mkdir()
        (folder / "adapter.safetensors").write_bytes(b"half")
    os.utime(old, (0, PROCESS_START_SECONDS - 1))
    prune_checkpoints(run, 2, saved)
    assert temporaries(run) == [young]
    assert (young / "adapter.safetensors").read_bytes() == b"half"


def test_other_files_of_the_run_are_left_alone(run: Path) -> None:
    for name in ("checkpoint-best", "checkpoint-20", "xcheckpoint-000001", "metrics.jsonl"):
        (run / name).mkdir(parents=True)
    for step in (10, 20, 30):
        saved = save(run, step)
    prune_checkpoints(run, 2, saved)
    assert names(run) == sorted(
        [
            "checkpoint-000020",
            "checkpoint-000030",
            "checkpoint-best",
            "checkpoint-20",
            "xcheckpoint-000001",
            "metrics.jsonl",
        ]
    )


def test_a_folder_that_cannot_be_deleted_is_logged(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (10, 20, 30):
        saved = save(run, step)

    def fail() -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with at_effect(1, fail, deletes=False):
        prune_checkpoints(run, 2, saved)
    assert "checkpoint-000010: cannot be deleted" in caplog.text
    prune_checkpoints(run, 2, saved)
    assert names(run) == ["checkpoint-000020", "checkpoint-000030"]

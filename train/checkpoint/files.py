"""Checkpoints to resume from: `checkpoint-000020/` with safetensors files, `state.json` and `COMMIT.json`.

A save writes a temporary folder, its COMMIT.json last (size and sha256 of each file), and renames the folder. What
differs from its COMMIT.json by one bit is refused. Only JSON and safetensors are ever read, nothing that runs code.
"""

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from shared.atomic_files import TEMPORARY, sync_folder
from shared.errors import CacheError, PrecogError
from shared.fingerprint import Json, canonical_json

FORMAT = 1
STATE, COMMIT = "state.json", "COMMIT.json"
MAX_JSON_BYTES = 16 * 2**20
MAX_HEADER_BYTES = 4 * 2**20
"""Of a safetensors file: some 30,000 tensors. The library alone takes 100 MB of header, and minutes to read it."""
NAME = re.compile(r"checkpoint-([0-9]{6,12})(\.old)?")
"""`.old` is on its way to being replaced by another checkpoint of the same step."""
PROCESS_START_SECONDS = time.time()

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The run after `step` optimizer steps; `tensors` is {file: {name: tensor on the CPU}}."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    commit: str
    """sha256 in its COMMIT.json, which names all its bytes."""


@dataclass(frozen=True, slots=True)
class _Seal:
    """One file's entry in COMMIT.json."""

    bytes: int
    sha256: str


class _Damage(Exception):
    """The file that is not to be trusted, and why."""


def save_checkpoint(
    run: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Json]
) -> Path:
    """Write `run/checkpoint-{step}` with `{name}.safetensors` per entry of `tensors`; it appears whole or not at all.

    A checkpoint of that step with the same content stays as it is; a damaged or different one is replaced. Raises
    `PrecogError` if the disk is full or fails; the checkpoints there were are then still there.
    """
    final = run / f"checkpoint-{step:06d}"
    temporary = run / f"{TEMPORARY}{secrets.token_hex(8)}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        seals = {STATE: _write_file(temporary / STATE, _state_bytes(state))}
        for name, group in sorted(tensors.items()):
            file_name = f"{name}.safetensors"
            assert _is_file_name(file_name), name
            seals[file_name] = _write_file(temporary / file_name, _tensor_bytes(group))
        _write_file(temporary / COMMIT, _commit_bytes(step, seals))
        sync_folder(temporary)
        if _valid_seals(final) != seals:
            _move_into_place(temporary, final)
        sync_folder(run)
    except OSError as error:
        raise PrecogError(
            f"{final}: cannot be saved ({error.strerror or error}); the checkpoints before it are kept"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint. Raises `CacheError` with one line that names the file and the reason."""
    try:
        step, seals, commit = _read_commit(path)
        contents = {name: _read_file(path, name, seal) for name, seal in seals.items()}
        state = _parse_json(contents.pop(STATE), STATE)
        tensors = {name.removesuffix(".safetensors"): _parse_tensors(data, name) for name, data in contents.items()}
    except _Damage as damage:
        raise CacheError(f"{path}: damaged checkpoint: {damage}") from None
    return Checkpoint(path, step, tensors, state, commit)


def latest_checkpoint(run: Path, *, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest valid checkpoint, or None if there is none of any kind; each damaged newer one is reported.

    Raises `CacheError` if all are damaged: to start from zero again is for a person to decide.
    """
    problems: list[str] = []
    for path in newest_first(run):
        try:
            checkpoint = load_checkpoint(path)
        except CacheError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            report(f"{problem}; going on from {path.name}")
        return checkpoint
    if problems:
        raise CacheError(
            f"{run}: no checkpoint is intact; restore one, or move them away to start from the beginning: "
            + "; ".join(problems)
        )
    return None


def newest_first(run: Path) -> list[Path]:
    """Everything in the folder that is named as a checkpoint, intact or not."""
    found = [(step_of(path), path.suffix != ".old", path) for path in _entries(run) if NAME.fullmatch(path.name)]
    return [path for _, _, path in sorted(found, reverse=True)]


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CacheError(f"{folder}: cannot be read ({error.strerror or error})") from None


def step_of(path: Path) -> int:
    """By its name."""
    match = NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def commit_of(path: Path) -> str | None:
    """The hash that a checkpoint's COMMIT.json has of itself; None if there is none that is whole."""
    try:
        return _read_commit(path)[2]
    except _Damage:
        return None


def prune_checkpoints(run: Path, keep: int, saved: Path) -> None:
    """Delete what is older than the newest `keep` intact checkpoints (two at least), and what dead runs left half done.

    Called after `saved` was saved, which stays in any case. Those kept are read again first. What cannot be deleted is
    logged and tried again next time.
    """
    kept: set[str] = set()
    for path in newest_first(run):
        name = path.name.removesuffix(".old")
        if path != saved and (len(kept) >= max(keep, 2) or name in kept):
            _delete(path)
        elif _valid_seals(path) is not None:
            kept.add(name)
    for temporary in run.glob(f"{TEMPORARY}*"):
        # A younger one may be of another process that is saving now.
        if temporary.lstat().st_mtime < PROCESS_START_SECONDS:
            shutil.rmtree(temporary, ignore_errors=True)


def _move_into_place(temporary: Path, final: Path) -> None:
    """Rename; an intact checkpoint of the same step stays readable as `.old` until the new one stands."""
    old = final.with_name(f"{final.name}.old")
    if _valid_seals(final) is not None:
        _delete(old)
        final.rename(old)
    else:
        _delete(final)
    temporary.rename(final)
    sync_folder(final.parent)
    _delete(old)


def _delete(path: Path) -> None:
    """One rename takes it out of sight first, so that no half-deleted checkpoint is ever seen."""
    try:
        if path.exists():
            shutil.rmtree(path.rename(path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")))
    except OSError as error:
        logger.warning("%s: cannot be deleted (%s)", path, error)


def _write_file(path: Path, data: bytes) -> _Seal:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return _Seal(len(data), hashlib.sha256(data).hexdigest())


def _state_bytes(state: Mapping[str, Json]) -> bytes:
    data = canonical_json(state)
    assert len(data) <= MAX_JSON_BYTES, "too large to be read again"
    return data


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    assert _header_bytes(data) <= MAX_HEADER_BYTES, "too many tensors to be read again"
    return data


def _commit_bytes(step: int, seals: Mapping[str, _Seal]) -> bytes:
    """COMMIT.json, which holds the hash of itself without that hash."""
    files: dict[str, Json] = {name: {"bytes": seal.bytes, "sha256": seal.sha256} for name, seal in seals.items()}
    commit: dict[str, Json] = {"format": FORMAT, "step": step, "files": files}
    return canonical_json({**commit, "sha256": hashlib.sha256(canonical_json(commit)).hexdigest()})


def _read_commit(path: Path) -> tuple[int, dict[str, _Seal], str]:
    """Step, files and own hash of a COMMIT.json that is byte for byte what we would write."""
    data = _read_bytes(path, COMMIT, MAX_JSON_BYTES)
    commit = _parse_json(data, COMMIT)
    if commit.get("format") != FORMAT:
        raise _Damage(f"{COMMIT}: format {commit.get('format')!r}, where this version reads {FORMAT}")
    try:
        step, seals = commit["step"], {name: _Seal(**entry) for name, entry in commit["files"].items()}
        typed = all(type(seal.bytes) is int and type(seal.sha256) is str for seal in seals.values())
        intact = typed and type(step) is int and _commit_bytes(step, seals) == data
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        intact = False
    if not intact:
        raise _Damage(f"{COMMIT}: does not match its own sha256")
    if (match := NAME.fullmatch(path.name)) is None or int(match[1]) != step:
        raise _Damage(f"{COMMIT}: is of step {step}")
    if STATE not in seals or not all(_is_file_name(name) for name in seals):
        raise _Damage(f"{COMMIT}: lists other files than a checkpoint has")
    return step, seals, commit["sha256"]


def _valid_seals(path: Path) -> dict[str, _Seal] | None:
    """The files of an intact checkpoint, without loading it."""
    try:
        _, seals, _ = _read_commit(path)
        for name, seal in seals.items():
            _read_file(path, name, seal)
    except _Damage:
        return None
    return seals


def _read_file(path: Path, name: str, seal: _Seal) -> bytes:
    data = _read_bytes(path, name, MAX_JSON_BYTES if name == STATE else seal.bytes)
    if len(data) != seal.bytes:
        raise _Damage(f"{name}: {len(data)} bytes instead of {seal.bytes}")
    if hashlib.sha256(data).hexdigest() != seal.sha256:
        raise _Damage(f"{name}: its sha256 is not the one in {COMMIT}")
    return data


def _read_bytes(path: Path, name: str, limit: int) -> bytes:
    """The whole file at once, so that what is verified is what is parsed."""
    try:
        status = (path / name).lstat()
        if not stat.S_ISREG(status.st_mode):
            raise _Damage(f"{name}: not a regular file")
        if status.st_size > limit:
            raise _Damage(f"{name}: {status.st_size} bytes, more than {limit}")
        return (path / name).read_bytes()
    except OSError as error:
        raise _Damage(f"{name}: {error.strerror}") from None


def _parse_json(data: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise _Damage(f"{name}: not valid JSON") from None
    if not isinstance(value, dict):
        raise _Damage(f"{name}: not a JSON object")
    return value


def _parse_tensors(data: bytes, name: str) -> dict[str, Tensor]:
    if _header_bytes(data) > MAX_HEADER_BYTES:
        raise _Damage(f"{name}: a header of {_header_bytes(data)} bytes, more than {MAX_HEADER_BYTES}")
    try:
        return load(data)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise _Damage(f"{name}: not valid safetensors ({error})") from None


def _header_bytes(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def _is_file_name(name: str) -> bool:
    return name == STATE or re.fullmatch(r"[A-Za-z0-9_-]{1,64}\.safetensors", name) is not None

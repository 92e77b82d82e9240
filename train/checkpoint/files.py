"""Checkpoints to resume from: `checkpoint-000020/` with safetensors files, `state.json` and `COMMIT.json`.

A save writes a temporary folder, COMMIT.json (size and sha256 of each file) last, and renames the folder. A checkpoint
that differs from its COMMIT.json by one bit is refused. Only JSON and safetensors are read, nothing that runs code.
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
"""Limit of a safetensors header, some 30,000 tensors. The library itself reads 100 MB, which takes minutes."""
NAME = re.compile(r"checkpoint-([0-9]{6,12})")
PROCESS_START_SECONDS = time.time()
Seal = dict[str, Any]
"""A file's entry in COMMIT.json: {"bytes": size, "sha256": hash}."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The run after `step` optimizer steps; `tensors` is {file: {name: tensor on the CPU}}."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    run: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Json]
) -> Path:
    """Write `run/checkpoint-{step}` with `{name}.safetensors` per entry of `tensors`, whole or not at all.

    A checkpoint of the same step is replaced. Raises `PrecogError` if the disk is full or fails; older checkpoints
    stay.
    """
    final = run / f"checkpoint-{step:06d}"
    temporary = run / f"{TEMPORARY}{secrets.token_hex(8)}"
    state_bytes = canonical_json(state)
    assert len(state_bytes) <= MAX_JSON_BYTES, "too large to be read again"
    try:
        run.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        seals = {STATE: _write_file(temporary / STATE, state_bytes)}
        for name, group in sorted(tensors.items()):
            assert _is_file_name(f"{name}.safetensors"), name
            data = save({key: tensor.detach().cpu().contiguous() for key, tensor in group.items()})
            assert _header_bytes(data) <= MAX_HEADER_BYTES, "too many tensors to be read again"
            seals[f"{name}.safetensors"] = _write_file(temporary / f"{name}.safetensors", data)
        _write_file(temporary / COMMIT, _commit_bytes(step, seals))
        sync_folder(temporary)
        _delete(final)  # a damaged one, which this run has passed over
        temporary.rename(final)
        sync_folder(run)
    except OSError as error:
        raise PrecogError(
            f"{final}: cannot be saved ({error.strerror or error}); "
            "older checkpoints are kept, free the disk and resume"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint. Raises `CacheError` with one line that names the file and the reason."""
    step, seals = _read_commit(path)
    contents = {name: _read_file(path / name, seal) for name, seal in seals.items()}
    state = _parse_json(contents.pop(STATE), path / STATE)
    tensors = {name.removesuffix(".safetensors"): _parse_tensors(data, path / name) for name, data in contents.items()}
    return Checkpoint(path, step, tensors, state)


def load_state(path: Path) -> dict[str, Any]:
    """Read and verify the `state` of one checkpoint without its tensors. Raises `CacheError`."""
    _, seals = _read_commit(path)
    return _parse_json(_read_file(path / STATE, seals[STATE]), path / STATE)


def latest_checkpoint(run: Path, *, report: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest valid checkpoint, None if the folder has none; each damaged newer one is reported.

    Raises `CacheError` if all are damaged: a person decides whether to start again.
    """
    problems: list[str] = []
    for path in newest_first(run):
        try:
            checkpoint = load_checkpoint(path)
        except CacheError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            report(f"{problem}; resuming from {path.name}")
        return checkpoint
    if problems:
        raise CacheError(
            f"{run}: no checkpoint is valid ({'; '.join(problems)}); "
            "restore one, or move them away to start from the beginning"
        )
    return None


def newest_first(run: Path) -> list[Path]:
    """Return every folder named as a checkpoint, valid or not, newest first."""
    try:
        paths = [path for path in run.iterdir() if NAME.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CacheError(f"{run}: cannot be read ({error.strerror or error})") from None
    return sorted(paths, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    match = NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def prune_checkpoints(run: Path, keep: int, saved: Path) -> None:
    """Delete checkpoints older than the newest `keep` valid ones (two at least), and temporary folders of dead runs.

    `saved` was just written and always stays. The others that stay are read again first. A folder that cannot be
    deleted is logged and tried again at the next save.
    """
    kept = 0
    for path in newest_first(run):
        if path != saved and kept >= max(keep, 2):
            _delete(path)
        elif _is_valid(path):
            kept += 1
    for temporary in run.glob(f"{TEMPORARY}*"):
        # A younger one may belong to another process that is saving now.
        if temporary.lstat().st_mtime < PROCESS_START_SECONDS:
            shutil.rmtree(temporary, ignore_errors=True)


def sync_file(path: Path) -> None:
    """Flush a file to disk (fsync)."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _delete(path: Path) -> None:
    """Rename a checkpoint first, so that no half-deleted one is ever seen, then remove it."""
    try:
        if path.exists():
            shutil.rmtree(path.rename(path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")))
    except OSError as error:
        logger.warning("%s: cannot be deleted (%s)", path, error)


def _write_file(path: Path, data: bytes) -> Seal:
    """Write and flush a new file; return its seal."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _commit_bytes(step: int, seals: Mapping[str, Seal]) -> bytes:
    """Return COMMIT.json, which holds the hash of its other entries."""
    commit: dict[str, Json] = {"format": FORMAT, "step": step, "files": dict(seals)}
    return canonical_json({**commit, "sha256": hashlib.sha256(canonical_json(commit)).hexdigest()})


def _read_commit(path: Path) -> tuple[int, dict[str, Seal]]:
    """Read step and files of a COMMIT.json; it must be byte for byte what `_commit_bytes` writes."""
    file = path / COMMIT
    data = _read_bytes(file, MAX_JSON_BYTES)
    commit = _parse_json(data, file)
    if commit.get("format") != FORMAT:
        raise _damage(file, f"expected format {FORMAT}, got {commit.get('format')!r}")
    try:
        step, seals = commit["step"], commit["files"]
        kinds = [{key: type(value) for key, value in seal.items()} for seal in seals.values()]
        typed = type(step) is int and all(kind == {"bytes": int, "sha256": str} for kind in kinds)
        valid = typed and _commit_bytes(step, seals) == data
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        valid = False
    if not valid:
        raise _damage(file, "does not match its own sha256")
    if step_of(path) != step:
        raise _damage(file, f"belongs to step {step}")
    if STATE not in seals or not all(_is_file_name(name) for name in seals):
        raise _damage(file, "lists other files than a checkpoint has")
    return step, seals


def _is_valid(path: Path) -> bool:
    """Verify the files of a checkpoint without parsing tensors."""
    try:
        for name, seal in _read_commit(path)[1].items():
            _read_file(path / name, seal)
    except CacheError:
        return False
    return True


def _read_file(file: Path, seal: Seal) -> bytes:
    """Read a file of a checkpoint; its size and sha256 must be those of its seal."""
    data = _read_bytes(file, MAX_JSON_BYTES if file.name == STATE else seal["bytes"])
    if len(data) != seal["bytes"]:
        raise _damage(file, f"expected {seal['bytes']} bytes, got {len(data)}")
    if hashlib.sha256(data).hexdigest() != seal["sha256"]:
        raise _damage(file, f"its sha256 is not the one in {COMMIT}")
    return data


def _read_bytes(file: Path, limit: int) -> bytes:
    """Read the whole file at once, so that the verified bytes are the parsed ones."""
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise _damage(file, "not a regular file")
        if status.st_size > limit:
            raise _damage(file, f"is {status.st_size} bytes; the limit is {limit} bytes")
        return file.read_bytes()
    except OSError as error:
        raise _damage(file, error.strerror or str(error)) from None


def _parse_json(data: bytes, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise _damage(file, "not valid JSON") from None
    if not isinstance(value, dict):
        raise _damage(file, "not a JSON object")
    return value


def _parse_tensors(data: bytes, file: Path) -> dict[str, Tensor]:
    if _header_bytes(data) > MAX_HEADER_BYTES:
        raise _damage(file, f"its header is {_header_bytes(data)} bytes; the limit is {MAX_HEADER_BYTES} bytes")
    try:
        return load(data)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise _damage(file, f"not valid safetensors ({error})") from None


def _damage(file: Path, reason: str) -> CacheError:
    return CacheError(f"{file}: damaged checkpoint ({reason}); restore it, or move the checkpoint away")


def _header_bytes(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def _is_file_name(name: str) -> bool:
    return name == STATE or re.fullmatch(r"[A-Za-z0-9_-]{1,64}\.safetensors", name) is not None

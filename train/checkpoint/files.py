"""Checkpoints to resume from: `checkpoint-000020/` with safetensors files, `state.json` and `COMMIT.json`.

A save writes a temporary folder, COMMIT.json (sha256 of each file and of itself) last, and renames the folder. A
checkpoint that differs from its COMMIT.json by one bit is refused. Only JSON and safetensors are read, nothing that
runs code.
"""

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from shared.atomic_files import TEMPORARY, sync_folder
from shared.errors import CacheError, PrecogError
from shared.fingerprint import Json, canonical_json, sealed, unsealed
from shared.model.adapters import PREFIX, pack_lora

FORMAT = 1
STATE, COMMIT, ADAPTER, OPTIMIZER = "state.json", "COMMIT.json", "adapter", "optimizer"
BASE, IDENTITY = "base", "identity"
"""In state.json: hash and marks of the transformer's weights; everything that a resumed run must share."""
NAME = re.compile(r"checkpoint-([0-9]{6,12})")
FILE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\.safetensors|state\.json")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The run after `step` optimizer steps; `tensors` is {file: {name: tensor on the CPU}}."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    run: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Json],
    header: Mapping[str, str] | None = None,
) -> Path:
    """Write `run/checkpoint-{step}` with `{name}.safetensors` per entry of `tensors`, whole or not at all.

    With a `header`, "adapter" becomes a LoRA file that diffusers loads with its alpha.
    A checkpoint of the same step is replaced. Raises `PrecogError` if the disk is full or fails; older checkpoints
    stay.
    """
    final = run / f"checkpoint-{step:06d}"
    temporary = run / f"{TEMPORARY}{secrets.token_hex(8)}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        hashes = {STATE: _write_file(temporary / STATE, canonical_json(state))}
        for name, group in sorted(tensors.items()):
            if name == ADAPTER and header is not None:
                data = pack_lora({f"{PREFIX}{key}": tensor for key, tensor in group.items()}, header)
            else:
                data = save({key: tensor.detach().cpu().contiguous() for key, tensor in group.items()})
            hashes[f"{name}.safetensors"] = _write_file(temporary / f"{name}.safetensors", data)
        _write_file(temporary / COMMIT, sealed({"format": FORMAT, "step": step, "files": hashes}))
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
    state, tensors = load_state(path), {}
    for name, sha256 in _read_commit(path).items():
        if name != STATE:
            try:
                group = load(_read_file(path / name, sha256))
            except (SafetensorError, KeyError, RuntimeError) as error:
                raise _damage(path / name, f"not valid safetensors ({error})") from None
            tensors[name.removesuffix(".safetensors")] = {key.removeprefix(PREFIX): group[key] for key in group}
    if not {ADAPTER, OPTIMIZER} <= tensors.keys():
        raise _damage(path / COMMIT, "lists no adapter or no optimizer")
    return Checkpoint(path, step_of(path), tensors, state)


def load_state(path: Path) -> dict[str, Any]:
    """Read and verify the `state` of one checkpoint without its tensors. Raises `CacheError`."""
    data = _read_file(path / STATE, _read_commit(path)[STATE])
    try:
        state = json.loads(data)
    except (ValueError, RecursionError):
        state = None
    base, identity = (state.get(name) if isinstance(state, dict) else None for name in (BASE, IDENTITY))
    if not (isinstance(base, dict) and {"sha256", "marks"} <= base.keys() and isinstance(identity, dict)):
        raise _damage(path / STATE, "not a JSON object with identity and base")
    return dict(state)


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
    return int(path.name.removeprefix("checkpoint-"))


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
    for temporary in run.glob(f"{TEMPORARY}*"):  # the folder is locked, so no other process is saving now
        shutil.rmtree(temporary, ignore_errors=True)


def _delete(path: Path) -> None:
    """Remove a checkpoint; one that a kill leaves half removed counts as damaged."""
    try:
        if path.exists():
            shutil.rmtree(path)
    except OSError as error:
        logger.warning("%s: cannot be deleted (%s)", path, error)


def _write_file(path: Path, data: bytes) -> str:
    """Write and flush a new file; return its sha256."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def _read_commit(path: Path) -> dict[str, str]:
    """Return {file name: sha256} of a COMMIT.json, which must be byte for byte what `save_checkpoint` writes."""
    file = path / COMMIT
    data = _read_file(file, None)
    try:
        commit = unsealed(data)
        if sealed(commit) != data:
            raise ValueError("not as it was written")
    except ValueError as error:
        raise _damage(file, str(error)) from None
    if commit.get("format") != FORMAT:
        raise _damage(file, f"expected format {FORMAT}, got {commit.get('format')!r}")
    if commit.get("step") != step_of(path):
        raise _damage(file, f"belongs to step {commit.get('step')}")
    files = commit.get("files")
    if not isinstance(files, dict) or STATE not in files or not all(map(FILE_NAME.fullmatch, files)):
        raise _damage(file, "lists other files than a checkpoint has")
    return files


def _is_valid(path: Path) -> bool:
    """Verify the files of a checkpoint without parsing tensors."""
    try:
        for name, sha256 in _read_commit(path).items():
            _read_file(path / name, sha256)
    except CacheError:
        return False
    return True


def _read_file(file: Path, sha256: str | None) -> bytes:
    """Read a file whole, so that the verified bytes are the parsed ones."""
    try:
        if not stat.S_ISREG(file.lstat().st_mode):
            raise _damage(file, "not a regular file")
        data = file.read_bytes()
    except OSError as error:
        raise _damage(file, error.strerror or str(error)) from None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise _damage(file, f"{len(data)} bytes whose sha256 is not the one in {COMMIT}")
    return data


def _damage(file: Path, reason: str) -> CacheError:
    return CacheError(f"{file}: damaged checkpoint ({reason}); restore it, or move the checkpoint away")

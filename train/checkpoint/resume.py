"""Where a run resumes: rank 0 chooses and loads the checkpoint, and every process gets it."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from shared import console
from shared.config import Config
from shared.errors import CacheError, UsageError
from shared.fingerprint import Json
from shared.model.pretrained import present_part
from train.checkpoint.files import (
    STATE,
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_state,
    newest_first,
    step_of,
)
from train.checkpoint.identity import Base, base_key, differences, identify_base, identity_of, refuse_another_run
from train.distributed import all_gather, broadcast, on_all_ranks, on_rank_0, rank_and_world_size
from train.export import BASE_KEY, CONFIG_KEY, STEPS_KEY, VIEW_KEY, config_key, read_provenance
from train.run import Run

BASE, IDENTITY = "base", "identity"
"""In state.json: hash and marks of the transformer's weights; everything that a resumed run must share."""


@dataclass(frozen=True, slots=True)
class Start:
    """Position of a run before its next step."""

    checkpoint: Checkpoint | None
    """None at the beginning."""
    base: Base
    state: dict[str, Json]
    """State that every checkpoint of this run stores."""


def find_start(run: Run) -> Start:
    """Choose, load, verify and compare the checkpoint; a collective that raises the same `PrecogError` on all ranks."""
    train = run.config.train
    checkpoint = _broadcast_checkpoint(
        on_rank_0(lambda: find_checkpoint(train.output_dir, train.resume_from_checkpoint))
    )
    known = None if checkpoint is None else checkpoint.state[BASE]
    base = on_all_ranks(lambda: identify_base(run.base, known))
    identity = on_all_ranks(lambda: identity_of(run, base))
    if checkpoint is not None:
        found, where = checkpoint.state[IDENTITY], str(checkpoint.path)
        on_all_ranks(lambda: refuse_another_run(found, identity, where))
    _refuse_different_ranks(all_gather({"last step": run.num_steps, **identity}))
    return Start(checkpoint, base, {IDENTITY: identity, BASE: base.as_json()})


def find_checkpoint(folder: Path, request: str) -> Checkpoint | None:
    """Load what `train.resume_from_checkpoint` asks for: "latest", a name, or "none"; None starts from the beginning.

    Raises `UsageError` for a name that is not found, for one with newer checkpoints, and for "none" where there are
    checkpoints; `CacheError` for a damaged one.
    """
    paths, where = newest_first(folder), f"train.resume_from_checkpoint = {request!r}"
    names = ", ".join(path.name for path in reversed(paths)) or "none"
    if request == "latest":
        return _complete(latest_checkpoint(folder, report=console.say))
    if request == "none":
        if paths:
            raise UsageError(
                f'{where}: {folder} has {names}; choose another train.output_dir, move them away, or set "latest"'
            )
        return None
    path = folder / request.rstrip("/")
    if path not in paths:
        raise UsageError(f"{where}: not found in {folder}; there are {names}")
    if newer := [other.name for other in reversed(paths) if step_of(other) > step_of(path)]:
        raise UsageError(
            f'{where}: {folder} has newer checkpoints; move {", ".join(newer)} to another folder, or set "latest"'
        )
    return _complete(load_checkpoint(path))


def is_finished(config: Config, view_hash: str) -> bool:
    """Check that the run folder has the export of this config, view and base model, and no checkpoint of another step.

    A run that was sent back to an older checkpoint is not finished; one whose checkpoints were deleted is.
    """
    folder, known = config.train.output_dir, None
    found, paths = read_provenance(folder), newest_first(folder)
    if (found.get(CONFIG_KEY), found.get(VIEW_KEY)) != (config_key(config), view_hash):
        return False
    if paths:
        if found.get(STEPS_KEY) != str(step_of(paths[0])):
            return False
        with suppress(CacheError):
            known = load_state(paths[0]).get(BASE)
    transformer = present_part(config.model, "transformer")
    return transformer is not None and found.get(BASE_KEY) == base_key(transformer, identify_base(transformer, known))


def _complete(checkpoint: Checkpoint | None) -> Checkpoint | None:
    """Raise `CacheError` if the state lacks a field that a resumed run reads."""
    if checkpoint is not None:
        base: Any = checkpoint.state.get(BASE)
        complete = isinstance(base, dict) and {"sha256", "marks"} <= base.keys()
        if not (complete and isinstance(checkpoint.state.get(IDENTITY), dict)):
            raise CacheError(f"{checkpoint.path / STATE}: no identity or base; move the checkpoint away")
    return checkpoint


def _broadcast_checkpoint(found: Checkpoint | None) -> Checkpoint | None:
    """Send the checkpoint of rank 0 to the other ranks, whose disks may not have it."""
    head = broadcast(None if found is None else (found.path, found.step, found.state, sorted(found.tensors)))
    if head is None or rank_and_world_size()[1] == 1:
        return found
    path, step, state, groups = head
    tensors = {name: load(broadcast(save(found.tensors[name]) if found else b"")) for name in groups}
    return Checkpoint(path, step, tensors, state)


def _refuse_different_ranks(runs: list[dict[str, Json]]) -> None:
    """Raise `CacheError`, the same on every process, if two ranks are not of one run."""
    for rank, other in enumerate(runs):
        found = [f"{name} is {there!r}, {here!r} on rank 0" for name, there, here in differences(other, runs[0])]
        if found:
            raise CacheError(
                f"rank {rank}: another run than rank 0's ({', '.join(found)}); "
                "give all processes the same config, cache and base model"
            )

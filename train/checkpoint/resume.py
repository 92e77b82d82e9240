"""Resuming a run: rank 0 chooses and loads the checkpoint, and every process compares its identity with the run's.

The identity is the view, the base model and the settings that a resumed run may not change.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared import console
from shared.cache.storage import open_storage
from shared.cache.view import read_view
from shared.config import Config, field_value, fields_shaping
from shared.errors import CacheError, UsageError
from shared.fingerprint import Json, key_of, sha256_file
from shared.model.adapters import BASE_KEY, CONFIG_KEY, STEPS_KEY, VIEW_KEY, read_header
from shared.model.pretrained import Component, base_key, present_part
from shared.run_folder import ADAPTER, EXPORT, adapter_file
from train.checkpoint.files import (
    BASE,
    IDENTITY,
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_state,
    newest_first,
    step_of,
)
from train.distributed import all_gather, broadcast, on_all_ranks, on_rank_0
from train.export import config_key
from train.run import Run


@dataclass(frozen=True, slots=True)
class Start:
    """Position of a run before its next step."""

    checkpoint: Checkpoint | None
    """None at the beginning."""
    state: dict[str, Any]
    """State that every checkpoint of this run stores: identity and base."""

    @property
    def base_sha256(self) -> str:
        """Hash of the frozen weights."""
        return str(self.state[BASE]["sha256"])


def find_start(run: Run) -> Start:
    """Choose, load, verify and compare the checkpoint; a collective that raises the same `PrecogError` on all ranks."""
    train = run.config.train
    # broadcast, because the other machines' disks may not have it
    checkpoint = broadcast(on_rank_0(lambda: find_checkpoint(train.output_dir, train.resume_from_checkpoint)))
    known = None if checkpoint is None else checkpoint.state[BASE]
    base = on_all_ranks(lambda: identify_base(run.base, known))
    identity = on_all_ranks(lambda: identity_of(run, base["sha256"]))
    if checkpoint is not None:
        saved, where = checkpoint.state[IDENTITY], str(checkpoint.path)
        on_all_ranks(lambda: refuse_another_run(saved, identity, where))
    runs = all_gather({"last step": run.num_steps, **identity})
    for rank, other in enumerate(runs):
        if found := [f"{name} is {there!r}, {here!r} on rank 0" for name, there, here in differences(other, runs[0])]:
            raise CacheError(
                f"rank {rank}: another run than rank 0's ({', '.join(found)}); "
                "give all processes the same config, cache and base model"
            )
    return Start(checkpoint, {IDENTITY: identity, BASE: base})


def find_checkpoint(folder: Path, request: str) -> Checkpoint | None:
    """Load what `train.resume_from_checkpoint` asks for: "latest", a name, or "none"; None starts from the beginning.

    Raises `UsageError` for a name that is not found, for one with newer checkpoints, and for "none" where there are
    checkpoints; `CacheError` for a damaged one.
    """
    paths, where = newest_first(folder), f"train.resume_from_checkpoint = {request!r}"
    names = ", ".join(path.name for path in reversed(paths)) or "none"
    path = folder / request.rstrip("/")
    if request == "latest":
        return latest_checkpoint(folder, report=console.say)
    if request == "none":
        if paths:
            raise UsageError(
                f'{where}: {folder} has {names}; choose another train.output_dir, move them away, or set "latest"'
            )
        return None
    if path not in paths:
        raise UsageError(f"{where}: not found in {folder}; there are {names}")
    if newer := [other.name for other in reversed(paths) if step_of(other) > step_of(path)]:
        raise UsageError(
            f'{where}: {folder} has newer checkpoints; move {", ".join(newer)} to another folder, or set "latest"'
        )
    return load_checkpoint(path)


def is_finished(config: Config) -> bool:
    """Check that the run folder has the export of this config, view and base model, and no checkpoint of another step.

    A run that was sent back to an older checkpoint is not finished; one whose checkpoints were deleted is.
    """
    folder, known = config.train.output_dir, None
    found, paths = read_header(folder / EXPORT / ADAPTER) or {}, newest_first(folder)
    if found.get(CONFIG_KEY) != config_key(config):
        return False
    storage = open_storage(config.precompute.cache, local_cache_gib=config.precompute.local_cache_gib)
    if found.get(VIEW_KEY) != read_view(storage, config.data.name).hash:
        return False
    if paths:
        if found.get(STEPS_KEY) != str(step_of(paths[0])):
            return False
        with suppress(CacheError):
            known = load_state(paths[0]).get(BASE)
    transformer = present_part(config.model, "transformer")
    return transformer is not None and found.get(BASE_KEY) == base_key(
        transformer, identify_base(transformer, known)["sha256"]
    )


def identify_base(transformer: Component, known: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the hash of the frozen weights, and the marks by which unchanged files are recognized unread.

    `known` from a checkpoint spares reading files that have its marks. A hub file's name is its hash, so hub files are
    never read.
    """
    marks = [list(mark) for mark in transformer.marks]
    if known is not None and known["marks"] == marks:
        return {"sha256": known["sha256"], "marks": marks}
    return {"sha256": key_of(transformer.sha256()), "marks": marks}


def identity_of(run: Run, base_sha256: str) -> dict[str, Json]:
    """Return everything that a resumed run must share with the run that made its checkpoints."""
    config, initial = run.config, run.config.train.initial_adapter
    settings = {name: field_value(config, name) for name in fields_shaping("run")}
    settings["train.lora_target_modules"].sort()  # the order does not change the adapter
    return {
        "view": run.view.hash,
        "train.shuffle_shards": "all" if run.windows is None else run.windows.name,
        **settings,
        "train.initial_adapter.sha256": None if initial is None else sha256_file(adapter_file(initial)),
        "train.mixed_precision": str(run.transformer.dtype).removeprefix("torch."),
        "transformer.config": run.base.settings,
        "transformer.weights": base_sha256,
    }


def refuse_another_run(saved: Mapping[str, Json], identity: Mapping[str, Json], where: str) -> None:
    """Raise `CacheError` naming each difference between the identity in a checkpoint and this run's."""
    if found := [f"{name} was {old!r}, is {new!r}" for name, old, new in differences(saved, identity)]:
        on = ", and this run's export as train.initial_adapter to go on from it" if found[0].startswith("view ") else ""
        raise CacheError(f"{where}: made by another run ({', '.join(found)}); choose another train.output_dir{on}")


def differences(left: Mapping[str, Json], right: Mapping[str, Json]) -> Iterator[tuple[str, Json, Json]]:
    """Yield the dotted names whose values differ, with both values; None is a missing value."""
    for name in sorted(left.keys() | right.keys()):
        one, other = left.get(name), right.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from ((f"{name}.{inner}", here, there) for inner, here, there in differences(one, other))
        elif one != other:
            yield name, one, other

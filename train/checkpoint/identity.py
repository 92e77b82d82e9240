"""The identity of a run: the view, the base model and the settings that a resumed run may not change."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.config import field_value, fields_shaping
from shared.errors import CacheError
from shared.fingerprint import Json, key_of, sha256_file
from shared.model.pretrained import Component, FileMark
from shared.run_folder import adapter_file
from train.run import Run

ORDER = "train.shuffle_shards"
"""In a run's identity: the order that `shuffle_shards` was resolved to."""


@dataclass(frozen=True, slots=True)
class Base:
    """The frozen weights of a run, as its checkpoints store them."""

    sha256: str
    """Hash of the hashes of all weight files, shortened as keys are."""
    marks: tuple[FileMark, ...]
    """Marks by which unchanged files are recognized without reading them."""

    def as_json(self) -> dict[str, Json]:
        """Return the record as `state.json` has it."""
        return {"sha256": self.sha256, "marks": [list(mark) for mark in self.marks]}


def identify_base(transformer: Component, known: Mapping[str, Any] | None) -> Base:
    """Return `known` from a checkpoint if the files have its marks, else read and hash them.

    A hub file's name is its hash, so hub files are never read.
    """
    marks = transformer.marks
    if known is not None and known["marks"] == [list(mark) for mark in marks]:
        return Base(known["sha256"], marks)
    return Base(key_of(transformer.sha256()), marks)


def base_key(transformer: Component, base: Base) -> str:
    """Return the key of weights and config, for the header of an export."""
    return key_of({"weights": base.sha256, "config": transformer.settings})


def identity_of(run: Run, base: Base) -> dict[str, Json]:
    """Return everything that a resumed run must share with the run that made its checkpoints."""
    config = run.config
    settings = {name: field_value(config, name) for name in fields_shaping("run")}
    settings["train.lora_target_modules"].sort()  # the order does not change the adapter
    return {
        "view": run.view.hash,
        ORDER: "all" if run.windows is None else run.windows.name,
        **settings,
        "train.initial_adapter.sha256": _sha256_of_adapter(config.train.initial_adapter),
        "train.mixed_precision": str(run.transformer.dtype).removeprefix("torch."),
        "transformer.config": run.base.settings,
        "transformer.weights": base.sha256,
    }


def _sha256_of_adapter(path: Path | None) -> str | None:
    return None if path is None else sha256_file(adapter_file(path))


def refuse_another_run(saved: Mapping[str, Any], identity: Mapping[str, Json], where: str) -> None:
    """Raise `CacheError` naming each difference between the identity in a checkpoint and this run's."""
    shown = [f"{name} was {old!r}, is {new!r}" for name, old, new in differences(saved, identity)]
    if shown:
        raise CacheError(f"{where}: made by another run ({', '.join(shown)}); choose another train.output_dir")


def differences(left: Mapping[str, Json], right: Mapping[str, Json]) -> Iterator[tuple[str, Json, Json]]:
    """Yield the dotted names whose values differ, with both values; None is a missing value."""
    for name in sorted(left.keys() | right.keys()):
        one, other = left.get(name), right.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from ((f"{name}.{inner}", here, there) for inner, here, there in differences(one, other))
        elif one != other:
            yield name, one, other

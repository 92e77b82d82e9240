"""Which transformer an adapter is trained on: the hash of its weight files, found without reading them where it can."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.fingerprint import Json, key_of
from shared.pretrained import FileMark, Part


@dataclass(frozen=True, slots=True)
class Base:
    """The frozen weights of a run, as its checkpoints remember them."""

    sha256: str
    """Of the hashes of all weight files, shortened as keys are."""
    marks: tuple[FileMark, ...]
    """By which the files are known again."""

    def as_json(self) -> dict[str, Json]:
        return {"sha256": self.sha256, "marks": [list(mark) for mark in self.marks]}


def identify_base(transformer: Part, known: Mapping[str, Any] | None) -> Base:
    """As `known` from a checkpoint, if the files have its sizes and times; else they are read and hashed.

    The name of a file from the hub is its hash, so that those are not read either way.
    """
    marks = transformer.marks
    if known is not None and known["marks"] == [list(mark) for mark in marks]:
        return Base(known["sha256"], marks)
    return Base(key_of(transformer.sha256()), marks)


def base_key(transformer: Part, base: Base) -> str:
    """Names weights and config, for the header of an export."""
    return key_of({"weights": base.sha256, "config": transformer.settings})

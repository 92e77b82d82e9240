"""Metadata on the config's fields: what a value shapes, and which flags of the reference script a field replaces.

Every list of field names (a recipe's entries, a view's settings, a run's identity) is derived from it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

Part = Literal[
    "clips", "buckets", "view", "latents", "image_latents", "prompts", "run", "resolved_by_run", "preview", "nothing"
]


@dataclass(frozen=True, slots=True)
class Shapes:
    """The part of the results that a field's value shapes."""

    part: Part
    recipe_entry: str = ""
    """Dotted name of the recipe's entry that holds the value."""


@dataclass(frozen=True, slots=True)
class Replaces:
    """Flags of diffusers' train_cogvideox_lora.py whose place the field takes."""

    flags: tuple[str, ...]
    value: str = ""
    """The value that does what the flag did."""


CLIPS = Shapes("clips")
"""Which frames and pixels a clip has: part of its key."""
BUCKETS = Shapes("buckets")
"""Acts through data.frame_buckets and data.resolution_buckets."""
VIEW = Shapes("view")
"""Which clips and captions the view has, without any clip's bytes."""
FIXED_BY_RUN = Shapes("run")
"""A resumed run must have the same value."""
RESOLVED_BY_RUN = Shapes("resolved_by_run")
"""A resumed run must have what the value came to (a hash, a dtype, an order)."""
IN_PREVIEW = Shapes("preview")
"""Written beside each preview."""
FREE = Shapes("nothing")
"""May change at any time: a place, an amount of work, something that is only shown."""


def meaning_of(field: FieldInfo) -> Shapes | None:
    """Return the field's `Shapes`, if it has one."""
    return next((entry for entry in field.metadata if isinstance(entry, Shapes)), None)


def require_meanings(table: type[BaseModel]) -> None:
    """Raise `TypeError` for a field that does not say what it shapes."""
    for name, field in table.model_fields.items():
        if meaning_of(field) is None:
            raise TypeError(f"{table.__name__}.{name}: annotate it with what it shapes, see shared/field_meaning.py")


def annotated_fields(tables: Mapping[str, type[BaseModel]]) -> Iterator[tuple[str, Shapes, Replaces]]:
    """Yield each field's dotted name, what it shapes and which flags it replaces."""
    for table, kind in tables.items():
        for name, field in kind.model_fields.items():
            meaning = meaning_of(field)
            assert meaning is not None
            replaces = next((entry for entry in field.metadata if isinstance(entry, Replaces)), Replaces(()))
            yield f"{table}.{name}", meaning, replaces

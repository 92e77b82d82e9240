"""What both passes of a run share."""

from dataclasses import dataclass, field

from precompute.assignments import Part
from precompute.recipes import Encoders, find_encoders
from precompute.report import Report
from shared.cache.storage import Storage, open_storage
from shared.config import Config


@dataclass(frozen=True, slots=True)
class Stage:
    """One run of stage 1."""

    config: Config
    storage: Storage
    encoders: Encoders
    part: Part
    report: Report
    faults: dict[str, str] = field(default_factory=dict)
    """Source -> why the machine could not read it; nothing of this is stored, and the run ends with an error."""


def open_stage(config: Config, part: Part = Part()) -> Stage:  # noqa: B008
    """Find the cache and the encoders; raises `UsageError` naming what is missing."""
    storage = open_storage(config.precompute.cache, local_cache_gib=config.precompute.local_cache_gib)
    return Stage(config, storage, find_encoders(config), part, Report())

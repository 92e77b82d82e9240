"""What both passes of a run share."""

from dataclasses import dataclass, field

from precompute.assignments import Part
from precompute.recipes import Encoders, find_encoders
from precompute.report import Report
from shared.cache.storage import Storage, open_storage
from shared.config import Config
from shared.signals import StopSignal


@dataclass(frozen=True, slots=True)
class Stage:
    """One run of stage 1."""

    config: Config
    storage: Storage
    encoders: Encoders
    part: Part
    stop: StopSignal
    report: Report
    faults: dict[str, str] = field(default_factory=dict)
    """Source -> why the machine could not read it; nothing of this is stored, and the run ends with an error."""

    def check(self) -> None:
        """Raises `Preempted` if a signal has come."""
        self.stop.check("finished shards are stored")


def open_stage(config: Config, part: Part, stop: StopSignal) -> Stage:
    """Find the cache and the encoders; raises `UsageError` naming what is missing."""
    storage = open_storage(config.precompute.cache, local_cache_gib=config.precompute.local_cache_gib)
    return Stage(config, storage, find_encoders(config), part, stop, Report())

"""Records that both passes of a run share."""

from dataclasses import dataclass, field

from precompute.assignments import Inventory, Part, PlannedShard, Wanted
from precompute.clip import Skipped
from precompute.recipes import Encoders, find_encoders
from precompute.report import SampleCounts
from shared.cache.storage import Storage, open_storage
from shared.config import Config


@dataclass(frozen=True, slots=True)
class Stage:
    """One run of stage 1."""

    config: Config
    storage: Storage
    encoders: Encoders
    part: Part


@dataclass(frozen=True, slots=True)
class Work:
    """The wanted keys of one collection, its contents, and the shards to make."""

    wanted: Wanted
    inventory: Inventory
    shards: list[PlannedShard]
    bytes_needed: int
    """Size of these shards, rounded up."""

    @property
    def planned(self) -> set[str]:
        return {key for shard in self.shards for key in shard.keys}

    @property
    def tally(self) -> SampleCounts:
        return SampleCounts(len(self.planned), len(self.inventory.stored & self.wanted.folders.keys()))


@dataclass(frozen=True, slots=True)
class PassResult:
    """The result of the prompts or the latents pass."""

    inventory: Inventory
    """The collection afterwards."""
    samples: SampleCounts
    written_bytes: int
    seconds: dict[str, float]
    """Activity -> time."""
    failed: dict[str, Skipped] = field(default_factory=dict)
    """Key -> transient failure; neither stored nor skipped."""


def open_stage(config: Config, part: Part = Part()) -> Stage:  # noqa: B008
    """Find the cache and the encoders; raises `UsageError` naming what is missing."""
    storage = open_storage(config.precompute.cache, local_cache_gib=config.precompute.local_cache_gib)
    return Stage(config, storage, find_encoders(config), part)

"""The report of a run of stage 1: what it made, and where the time went."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from precompute.assignments import Inventory
from precompute.findings import DataFinding
from shared.media.probe import Skipped

Item = TypeVar("Item")


class Timer:
    """A stopwatch with one total per activity."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time of the block to the activity `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def waiting(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items; the time until each one comes is added to the activity `name`."""
        iterator = iter(items)
        while True:
            with self.measure(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item


@dataclass(frozen=True, slots=True)
class SampleCounts:
    """Samples of one kind: made by this run (or to be made by the planned one), and stored before."""

    made: int = 0
    reused: int = 0

    def __str__(self) -> str:
        return f"{self.made}, {self.reused} reused"


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


@dataclass(frozen=True, slots=True)
class Report:
    """The results of a run; `as_json` is the `--json` contract."""

    clips: int = 0
    latents: SampleCounts = SampleCounts()
    prompts: SampleCounts = SampleCounts()
    written_bytes: int = 0
    """Shards and receipts; files that existed before are not counted."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Source and reason, sorted by source."""
    retryable: int = 0
    """Skipped clips that `precompute.retry_skipped` tries again; the other ones are looked at in every run."""
    warnings: list[str] = field(default_factory=list)
    findings: list[DataFinding] = field(default_factory=list)
    """Weak captions, and clips that are there twice."""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def clips_per_second(self) -> float:
        """Rate of the video pass without loading; 0 if there was none."""
        return self.latents.made / max(self.seconds.get("video_pass", 0.0), 1e-9)

    def waited_share(self, name: str) -> float:
        """Return the share of the video pass in which the encoder waited for "decode" or "write"."""
        return self.seconds.get(f"wait_for_{name}", 0.0) / max(self.seconds.get("video_pass", 0.0), 1e-9)

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return {
            **asdict(self),
            "latents": {"encoded": self.latents.made, "reused": self.latents.reused},
            "prompts": {"encoded": self.prompts.made, "reused": self.prompts.reused},
            "skipped": reasons_json(self.skipped),
            "clips_per_second": round(self.clips_per_second, 3),
            "waited_share": {name: round(self.waited_share(name), 3) for name in ("decode", "write")},
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }


def reasons_json(reasons: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Return (source, reason) pairs as JSON objects."""
    return [{"source": source, "reason": reason} for source, reason in reasons]


def merge(reports: Sequence[Report]) -> Report:
    """Merge the reports of workers: encoded samples are summed, times are those of the slowest.

    A worker counts samples that other workers made meanwhile as reused.
    """
    first, seconds = reports[0], dict[str, float]()
    for report in reports:
        seconds |= {name: max(value, seconds.get(name, 0.0)) for name, value in report.seconds.items()}
    latents, prompts = sum(report.latents.made for report in reports), sum(report.prompts.made for report in reports)
    return replace(
        first,
        latents=SampleCounts(latents, max(0, first.latents.made + first.latents.reused - latents)),
        prompts=SampleCounts(prompts, max(0, first.prompts.made + first.prompts.reused - prompts)),
        written_bytes=sum(report.written_bytes for report in reports),
        seconds=seconds,
    )

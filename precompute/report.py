"""What a run of stage 1 did, and where the time went."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(slots=True)
class Report:
    """What a run did; `as_json` is the `--json` contract."""

    clips: int = 0
    latents_encoded: int = 0
    latents_reused: int = 0
    prompts_encoded: int = 0
    prompts_reused: int = 0
    truncated_captions: int = 0
    written_bytes: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "clips": self.clips,
            "latents": {"encoded": self.latents_encoded, "reused": self.latents_reused},
            "prompts": {"encoded": self.prompts_encoded, "reused": self.prompts_reused},
            "truncated_captions": self.truncated_captions,
            "written_bytes": self.written_bytes,
            "skipped": [{"source": source, "reason": reason} for source, reason in self.skipped],
            "warnings": self.warnings,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }

    def spend(self, name: str, started: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def merge(reports: Sequence[Report]) -> Report:
    """What workers did together: what they encoded is summed, times are those of the slowest."""
    first = reports[0]
    latents = sum(report.latents_encoded for report in reports)
    prompts = sum(report.prompts_encoded for report in reports)
    return replace(
        first,
        latents_encoded=latents,
        # To each worker, what the others made meanwhile looks reused.
        latents_reused=max(0, first.latents_reused + first.latents_encoded - latents),
        prompts_encoded=prompts,
        prompts_reused=max(0, first.prompts_reused + first.prompts_encoded - prompts),
        written_bytes=sum(report.written_bytes for report in reports),
        seconds={
            name: max(report.seconds.get(name, 0.0) for report in reports)
            for name in dict.fromkeys(name for report in reports for name in report.seconds)
        },
    )

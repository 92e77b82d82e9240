"""A shard from samples in memory, for benches and tests; stage 1 streams its samples."""

from collections.abc import Iterable, Mapping

from shared.cache.shard import Receipt, Sample, ShardWriter
from shared.cache.storage import Storage


def write_shard(
    storage: Storage,
    folder: str,
    samples: Iterable[Sample],
    skipped: Mapping[str, str] | None = None,
    attempt: int = 0,
) -> tuple[Receipt, int]:
    """Write a shard whose samples are in memory; return as `ShardWriter.finish`."""
    with ShardWriter(storage, folder) as writer:
        for sample in sorted(samples, key=lambda sample: sample.key):
            writer.add(sample)
        return writer.finish(skipped or {}, attempt)

"""The VAE pass: clips are decoded ahead, encoded batch by batch and written behind."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import torch

from precompute import recipes
from precompute.assignments import PlannedShard, shards_to_make, unmade
from precompute.clip_encoder import ClipEncoder, Launched
from precompute.discover import Clip, Stage
from precompute.encoders import VaeEncoder
from precompute.estimate import Work
from precompute.pixels import scaled_into
from precompute.report import PassResult, SampleCounts, Timer
from shared import console
from shared.cache.shard import Sample, ShardWriter
from shared.cache.storage import Storage
from shared.device import choose_device
from shared.media.child import Decoded, DecodeJob
from shared.media.pool import DecodePool
from shared.media.probe import Skipped

DECODED_BATCHES = 2
"""Batches that are decoded ahead of the encoder."""
MAX_WRITING = 2
"""Encoded batches in memory that wait for the disk."""
Outcomes = dict[str, Decoded | Skipped]
"""Key -> frames, or the reason why there are none."""


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """The results for one batch of a planned shard."""

    planned: PlannedShard
    is_last: bool
    samples: list[Sample]
    skipped: dict[str, str]
    """Key -> reason of a permanent failure."""
    failed: dict[str, Skipped]
    """Key -> transient failure."""


def encode_latents(stage: Stage, work: Work, clips: Mapping[str, Clip], pool: DecodePool) -> PassResult:
    """Encode the clips (key -> clip) that are not stored; the VAE is loaded only if there are any.

    Clips with a transient failure are neither stored nor skipped, unless another worker made them.
    """
    timer, encoder, wanted, settings = Timer(), None, work.wanted, stage.config.precompute
    failed: dict[str, Skipped] = {}
    writes: list[Future[tuple[int, float]]] = []
    made = 0
    shards, inventory = shards_to_make(stage.storage, wanted, work.inventory, stage.part)
    while shards:
        if encoder is None:
            with timer.measure("load_vae"):
                vae = VaeEncoder(stage.encoders.vae, settings, choose_device(settings.device))
            encoder = ClipEncoder(stage, clips, vae)
            recipes.record_environment(stage.storage, wanted.collection, vae.device)
        with (
            timer.measure("video_pass"),
            console.Progress("clips", sum(len(shard.keys) for shard in shards)) as bar,
            closing(ShardOutput(stage.storage)) as output,
            ThreadPoolExecutor(1) as writer,
        ):
            batches = _decode_batches(stage, unmade(stage.storage, shards), clips, pool)
            for batch in _encode_batches(batches, encoder, timer, bar):
                if len(writes) >= MAX_WRITING:
                    with timer.measure("wait_for_write"):
                        writes[-MAX_WRITING].result()
                writes.append(writer.submit(output.write, batch))
                made += len(batch.samples)
                failed |= batch.failed
        for write in writes:
            write.result()
        shards, inventory = shards_to_make(stage.storage, wanted, inventory, stage.part, failed)
    seconds = {**timer.seconds, "write": sum(write.result()[1] for write in writes)}
    reused = len(inventory.stored & clips.keys()) - made
    failed = {key: skip for key, skip in failed.items() if key not in inventory.stored | inventory.skipped.keys()}
    return PassResult(
        inventory, SampleCounts(made, reused), sum(write.result()[0] for write in writes), seconds, failed
    )


class ShardOutput:
    """The shards being written, one after another, batch by batch."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._writer: ShardWriter | None = None
        self._stored, self._skipped, self._failed = 0, dict[str, str](), False

    def close(self) -> None:
        """Give up the unfinished shard."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def write(self, batch: EncodedBatch) -> tuple[int, float]:
        """Write a batch, and with its last one the shard; return bytes stored and seconds."""
        started = time.perf_counter()
        if self._writer is None:
            self._writer = ShardWriter(self._storage, batch.planned.folder)
            self._stored, self._skipped, self._failed = 0, {}, False
        for sample in batch.samples:
            self._writer.add(sample)
        self._stored += len(batch.samples)
        self._skipped |= batch.skipped
        self._failed |= bool(batch.failed)
        written_bytes = self._finish(batch.planned) if batch.is_last else 0
        return written_bytes, time.perf_counter() - started

    def _finish(self, planned: PlannedShard) -> int:
        """Finish the shard; without the failed clips it has another name, from its other keys."""
        assert self._writer is not None
        another_had_all_clips = self._failed and self._storage.size(planned.receipt) is not None
        written_bytes = 0
        if not another_had_all_clips and (self._stored or self._skipped):
            written_bytes = self._writer.finish(self._skipped, planned.attempt)[1]
        self.close()
        return written_bytes


def _encode_batches(
    batches: Iterator[tuple[PlannedShard, Outcomes]], encoder: ClipEncoder, timer: Timer, bar: console.Progress
) -> Iterator[EncodedBatch]:
    """Yield each batch when it is encoded, in order."""
    under_way: deque[tuple[PlannedShard, Outcomes, Launched]] = deque()
    for shard, outcomes in timer.waiting("wait_for_decode", batches):
        decoded = {key: outcome for key, outcome in outcomes.items() if isinstance(outcome, Decoded)}
        with timer.measure("encode_latents"):
            under_way.append((shard, outcomes, encoder.launch(decoded)))
        while len(under_way) > encoder.num_under_way:
            yield _encoded(*under_way.popleft(), timer, bar)
    for batch in under_way:
        yield _encoded(*batch, timer, bar)


def _encoded(
    shard: PlannedShard, outcomes: Outcomes, launched: Launched, timer: Timer, bar: console.Progress
) -> EncodedBatch:
    """Wait for the results of a batch; clips that are not finite are skipped."""
    skips = {key: outcome for key, outcome in outcomes.items() if isinstance(outcome, Skipped)}
    skipped = {key: skip.reason for key, skip in skips.items() if skip.permanent}
    samples = []
    with timer.measure("encode_latents"):
        for sample in launched.samples():
            if all(torch.isfinite(tensor).all() for tensor in sample.tensors.values()):
                samples.append(sample)
            else:
                skipped[sample.key] = "non-finite latents; set precompute.vae_dtype = 'fp32'"
    bar.advance(len(outcomes))
    failed = {key: skip for key, skip in skips.items() if not skip.permanent}
    return EncodedBatch(shard, shard.keys[-1] in outcomes, samples, skipped, failed)


def _decode_batches(
    stage: Stage, shards: Iterator[PlannedShard], clips: Mapping[str, Clip], pool: DecodePool
) -> Iterator[tuple[PlannedShard, Outcomes]]:
    """Yield every encode batch in order, as its shard and outcomes."""
    planned: deque[tuple[PlannedShard, tuple[str, ...]]] = deque()
    settings, mode = stage.config.precompute, stage.config.data.video_reshape_mode

    def jobs() -> Iterator[DecodeJob]:
        for shard in shards:
            for batch in shard.batches:
                planned.append((shard, batch))
                for clip in (clips[key] for key in batch):
                    indices, times, probe = clip.window.indices, clip.window.timestamps_us, clip.probe
                    seed = recipes.crop_seed(probe.sha256, times)
                    scaled = scaled_into(probe.height, probe.width, clip.window.bucket, mode, seed)
                    yield DecodeJob(clip.source.path, probe, indices, times, settings.decoder, scaled)

    outcomes = pool.decode_all(jobs(), ahead=DECODED_BATCHES * settings.vae_batch_size)
    for first in outcomes:
        shard, batch = planned.popleft()
        yield shard, dict(zip(batch, [first, *islice(outcomes, len(batch) - 1)], strict=True))

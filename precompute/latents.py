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
from precompute.discover import Clip, Stage
from precompute.encoders import VaeEncoder
from precompute.estimate import Work
from precompute.pixels import scaled_into, thumbnails, to_clip
from precompute.report import PassResult, SampleCounts, Timer
from shared import console, seeding
from shared.cache.shard import Sample, ShardWriter
from shared.cache.storage import Storage
from shared.device import choose_device
from shared.errors import UsageError
from shared.fingerprint import Json
from shared.media.child import Decoded, DecodeJob
from shared.media.pool import DecodePool
from shared.media.probe import Skipped
from shared.model.geometry import Bucket, latent_shape

DECODED_BATCHES = 2
"""Batches that are decoded ahead of the encoder."""
MAX_WRITING = 2
"""Encoded batches in memory that wait for the disk."""


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
                encoder = VaeEncoder(stage.encoders.vae, settings, choose_device(settings.device))
            recipes.record_environment(stage.storage, wanted.collection, encoder.device)
        with (
            timer.measure("video_pass"),
            console.Progress("clips", sum(len(shard.keys) for shard in shards)) as bar,
            closing(ShardOutput(stage.storage)) as output,
            ThreadPoolExecutor(1) as writer,
        ):
            batches = _decode_batches(stage, unmade(stage.storage, shards), clips, pool)
            for batch in _encode_batches(stage, batches, clips, encoder, timer, bar):
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
    stage: Stage,
    batches: Iterator[tuple[PlannedShard, dict[str, Decoded | Skipped]]],
    clips: Mapping[str, Clip],
    encoder: VaeEncoder,
    timer: Timer,
    bar: console.Progress,
) -> Iterator[EncodedBatch]:
    """Yield each batch when it is encoded."""
    for shard, outcomes in timer.waiting("wait_for_decode", batches):
        decoded = {key: outcome for key, outcome in outcomes.items() if isinstance(outcome, Decoded)}
        skips = {key: outcome for key, outcome in outcomes.items() if isinstance(outcome, Skipped)}
        skipped = {key: skip.reason for key, skip in skips.items() if skip.permanent}
        samples = []
        with timer.measure("encode_latents"):
            for sample in encode_clips(stage, clips, decoded, encoder):
                if all(torch.isfinite(tensor).all() for tensor in sample.tensors.values()):
                    samples.append(sample)
                else:
                    skipped[sample.key] = "non-finite latents; set precompute.vae_dtype = 'fp32'"
        bar.advance(len(outcomes))
        failed = {key: skip for key, skip in skips.items() if not skip.permanent}
        yield EncodedBatch(shard, shard.keys[-1] in outcomes, samples, skipped, failed)


def _decode_batches(
    stage: Stage, shards: Iterator[PlannedShard], clips: Mapping[str, Clip], pool: DecodePool
) -> Iterator[tuple[PlannedShard, dict[str, Decoded | Skipped]]]:
    """Yield every encode batch in order, as its shard and key -> frames or the reason why there are none."""
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


def encode_clips(
    stage: Stage, clips: Mapping[str, Clip], decoded: Mapping[str, Decoded], encoder: VaeEncoder
) -> list[Sample]:
    """Encode one batch of one bucket; raises `UsageError` if training could not use the result."""
    if not decoded:
        return []
    pixels = {
        key: to_clip(
            torch.from_numpy(result.frames).to(encoder.device),
            clips[key].window.bucket,
            flip=clips[key].window.flip,
        )
        for key, result in decoded.items()
    }
    moments = encoder.encode(torch.stack(list(pixels.values())))
    _check_shape(stage, clips[next(iter(decoded))].window.bucket, moments)
    samples = []
    for key, clip_moments in zip(decoded, moments, strict=True):
        tensors = {"moments": clip_moments, "thumbnails": thumbnails(pixels[key])}
        if stage.encoders.conventions.image_to_video:
            images = conditioning_images(pixels[key][:, :1], stage.config.precompute.noised_image_count, key)
            tensors["image_moments"] = torch.cat([encoder.encode(image[None]) for image in images])
        window = clips[key].window
        facts: dict[str, Json] = {
            "source_sha256": clips[key].probe.sha256,
            "bucket": str(window.bucket),
            "timestamps_us": list(window.timestamps_us),
            "flip": window.flip,
            "decoder": decoded[key].decoder,
        }
        samples.append(Sample(key, tensors, facts))
    return samples


def _check_shape(stage: Stage, bucket: Bucket, moments: torch.Tensor) -> None:
    """Raise `UsageError` for moments [B,2C,F,H,W] of another size than the bucket's, before hours are spent."""
    channels, *size = latent_shape(bucket, stage.encoders.conventions.out_channels)
    expected, found = (2 * channels, *size), tuple(moments.shape[1:])
    if found == expected:
        return
    assert stage.config.precompute.enable_tiling, f"{found} is not {expected}"
    by = "x".join
    raise UsageError(
        f"precompute.enable_tiling = true: the VAE's tiles do not fit clips of {bucket}: expected moments of "
        f"{by(map(str, expected))}, got {by(map(str, found))}; leave it false or choose other data.resolution_buckets"
    )


def conditioning_images(first_frame: torch.Tensor, noised: int, key: str) -> list[torch.Tensor]:
    """Return the clean frame [3,1,H,W] and `noised` copies + sigma * noise, sigma = exp(N(-3, 0.5)) drawn by key.

    Source: diffusers `train_cogvideox_image_to_video_lora.py` (noise in pixel space before the VAE).
    """
    images = [first_frame]
    for number in range(noised):
        sigma = float(seeding.normal((1,), "image-sigma", key, number).mul(0.5).sub(3.0).exp())
        noise = seeding.normal(tuple(first_frame.shape), "image-noise", key, number)
        images.append(first_frame + sigma * noise.to(first_frame.device))
    return images

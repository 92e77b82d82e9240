"""The VAE pass: clips are decoded ahead, encoded batch by batch and written behind."""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import torch

from precompute import provenance, recipes
from precompute.assignments import PlannedShard, shards_to_make, unmade
from precompute.clip import Clip, Skipped
from precompute.encoders import VaeEncoder, vae_precision
from precompute.report import SampleCounts, Timer
from precompute.stage import PassResult, Stage, Work
from precompute.video.child import Decoded, DecodeJob
from precompute.video.pixels import to_clip
from precompute.video.pool import DecodePool
from shared import console, seeding
from shared.cache.shard import Sample, write_shard
from shared.cache.storage import Storage
from shared.device import choose_device
from shared.errors import UsageError
from shared.fingerprint import Json
from shared.model.geometry import Bucket, latent_shape

DECODED_BATCHES = 2
"""Batches that are decoded ahead of the encoder."""
MAX_WRITING = 2
"""Shards in memory that wait for the disk."""


@dataclass(frozen=True, slots=True)
class EncodedShard:
    """The results for one planned shard."""

    planned: PlannedShard
    samples: list[Sample]
    skipped: dict[str, str]
    """Key -> reason of a permanent failure."""
    failed: dict[str, Skipped]
    """Key -> transient failure."""


def encode_latents(stage: Stage, work: Work, clips: Mapping[str, Clip], pool: DecodePool) -> PassResult:
    """Encode the clips (key -> clip) that are not stored; the VAE is loaded only if there are any.

    Clips with a transient failure are neither stored nor skipped, unless another worker made them.
    """
    timer, encoder, wanted = Timer(), None, work.wanted
    failed: dict[str, Skipped] = {}
    writes: list[Future[tuple[int, float]]] = []
    made = 0
    shards, inventory = shards_to_make(stage.storage, wanted, work.inventory, stage.part)
    while shards:
        if encoder is None:
            with timer.measure("load_vae"):
                encoder = load_vae(stage)
            provenance.record(stage.storage, wanted.collection, encoder.device)
        with (
            timer.measure("video_pass"),
            console.Progress("clips", sum(len(shard.keys) for shard in shards)) as bar,
            ThreadPoolExecutor(1) as writer,
        ):
            for shard in _encode_shards(stage, unmade(stage.storage, shards), clips, encoder, pool, timer, bar):
                if len(writes) >= MAX_WRITING:
                    with timer.measure("wait_for_write"):
                        writes[-MAX_WRITING].result()
                writes.append(writer.submit(_write, stage.storage, shard))
                made += len(shard.samples)
                failed |= shard.failed
        for write in writes:
            write.result()
        shards, inventory = shards_to_make(stage.storage, wanted, inventory, stage.part, failed)
    seconds = {**timer.seconds, "write": sum(write.result()[1] for write in writes)}
    reused = len(inventory.stored & clips.keys()) - made
    failed = {key: skip for key, skip in failed.items() if key not in inventory.stored | inventory.skipped.keys()}
    return PassResult(
        inventory, SampleCounts(made, reused), sum(write.result()[0] for write in writes), seconds, failed
    )


def load_vae(stage: Stage) -> VaeEncoder:
    """Load the VAE's encoder with the config's settings."""
    settings, vae = stage.config.precompute, stage.encoders.vae
    return VaeEncoder(
        vae,
        vae_precision(settings.vae_dtype, vae),
        choose_device(settings.device),
        tiling=settings.enable_tiling,
        slicing=settings.enable_slicing,
        channels_last=settings.channels_last,
        compiled=settings.compile_vae,
    )


def _write(storage: Storage, shard: EncodedShard) -> tuple[int, float]:
    """Write a shard; return bytes and seconds. Without the failed clips it has another name, from its other keys."""
    started = time.perf_counter()
    if not shard.samples and not shard.skipped:
        return 0, 0.0
    if shard.failed and storage.size(shard.planned.receipt) is not None:  # another worker had all clips
        return 0, 0.0
    planned = shard.planned
    _, written_bytes = write_shard(storage, planned.folder, shard.samples, shard.skipped, planned.attempt)
    return written_bytes, time.perf_counter() - started


def decode_job(stage: Stage, clip: Clip) -> DecodeJob:
    """Return the job that decodes a clip's frames."""
    window = clip.window
    return DecodeJob(
        clip.source.path, clip.probe, window.indices, window.timestamps_us, stage.config.precompute.decoder
    )


def _encode_shards(
    stage: Stage,
    shards: Iterator[PlannedShard],
    clips: Mapping[str, Clip],
    encoder: VaeEncoder,
    pool: DecodePool,
    timer: Timer,
    bar: console.Progress,
) -> Iterator[EncodedShard]:
    """Yield each shard when its last batch is encoded."""
    samples, skipped, failed = list[Sample](), dict[str, str](), dict[str, Skipped]()
    for shard, outcomes in timer.waiting("wait_for_decode", _decode_batches(stage, shards, clips, pool)):
        decoded = {key: outcome for key, outcome in outcomes.items() if isinstance(outcome, Decoded)}
        skips = {key: outcome for key, outcome in outcomes.items() if isinstance(outcome, Skipped)}
        skipped |= {key: skip.reason for key, skip in skips.items() if skip.permanent}
        failed |= {key: skip for key, skip in skips.items() if not skip.permanent}
        with timer.measure("encode_latents"):
            for sample in encode_clips(stage, clips, decoded, encoder):
                if all(torch.isfinite(tensor).all() for tensor in sample.tensors.values()):
                    samples.append(sample)
                else:
                    skipped[sample.key] = "non-finite latents; set precompute.vae_dtype = 'fp32'"
        bar.advance(len(outcomes))
        if shard.keys[-1] in outcomes:
            yield EncodedShard(shard, samples, skipped, failed)
            samples, skipped, failed = [], {}, {}


def _decode_batches(
    stage: Stage, shards: Iterator[PlannedShard], clips: Mapping[str, Clip], pool: DecodePool
) -> Iterator[tuple[PlannedShard, dict[str, Decoded | Skipped]]]:
    """Yield every encode batch in order, as its shard and key -> frames or the reason why there are none."""
    planned: deque[tuple[PlannedShard, tuple[str, ...]]] = deque()

    def jobs() -> Iterator[DecodeJob]:
        for shard in shards:
            for batch in shard.batches:
                planned.append((shard, batch))
                yield from (decode_job(stage, clips[key]) for key in batch)

    outcomes = pool.decode_all(jobs(), ahead=DECODED_BATCHES * stage.config.precompute.vae_batch_size)
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
            mode=stage.config.data.video_reshape_mode,
            flip=clips[key].window.flip,
            crop_seed=recipes.crop_seed(clips[key]),
        )
        for key, result in decoded.items()
    }
    moments = encoder.encode(torch.stack(list(pixels.values())))
    _check_shape(stage, clips[next(iter(decoded))].window.bucket, moments)
    samples = []
    for key, clip_moments in zip(decoded, moments, strict=True):
        tensors = {"moments": clip_moments}
        if stage.encoders.conventions.image_to_video:
            images = conditioning_images(pixels[key][:, :1], stage.config.precompute.noised_image_count, key)
            tensors["image_moments"] = torch.cat([encoder.encode(image[None]) for image in images])
        samples.append(Sample(key, tensors, _facts(clips[key], decoded[key].decoder)))
    return samples


def _check_shape(stage: Stage, bucket: Bucket, moments: torch.Tensor) -> None:
    """Raise `UsageError` for moments [B,2C,F,H,W] of another size than the bucket's, before hours are spent."""
    channels, *size = latent_shape(bucket, stage.encoders.conventions.out_channels)
    expected, found = (2 * channels, *size), tuple(moments.shape[1:])
    if found == expected:
        return
    assert stage.config.precompute.enable_tiling, f"{found} is not {expected}"
    raise UsageError(
        f"precompute.enable_tiling = true: the VAE's tiles do not fit clips of {bucket}: expected moments of "
        f"{_by(expected)}, got {_by(found)}; leave it false or choose other data.resolution_buckets"
    )


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


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


def _facts(clip: Clip, decoder: str) -> dict[str, Json]:
    return {
        "source_sha256": clip.probe.sha256,
        "bucket": str(clip.window.bucket),
        "timestamps_us": list(clip.window.timestamps_us),
        "flip": clip.window.flip,
        "decoder": decoder,
    }

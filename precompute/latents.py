"""The VAE pass: decode ahead, encode batch by batch, write behind. The report says who waited for whom."""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from precompute import provenance, recipes
from precompute.assignments import Inventory, PlannedShard, make_missing
from precompute.clip import Clip, Skipped
from precompute.encoders import VaeEncoder, vae_precision
from precompute.report import Report
from precompute.stage import Stage
from precompute.video.child import Decoded, DecodeJob
from precompute.video.pixels import to_clip
from precompute.video.pool import DecodePool
from shared import console, seeding
from shared.cache.collection import Collection
from shared.cache.shard import Sample, write_shard
from shared.cache.storage import Storage
from shared.device import choose_device
from shared.errors import UsageError
from shared.fingerprint import Json
from shared.model.geometry import Bucket, latent_shape


def encode_latents(stage: Stage, collection: Collection, clips: Sequence[Clip], pool: DecodePool) -> Inventory:
    """Encode the clips that are not stored; what the collection holds of them afterwards.

    Clips of a source in `stage.faults` may be neither stored nor skipped then.
    """
    given_up: dict[str, str] = {}
    by_key = {clip.key: clip for clip in clips}
    settings, report = stage.config.precompute, stage.report

    def make(todo: Iterator[PlannedShard], total: int) -> None:
        started = time.perf_counter()
        encoder = load_vae(stage)
        report.spend("load_vae", started)
        provenance.record(stage.storage, collection, encoder.device)
        pass_started = time.perf_counter()
        with console.Progress("clips", total) as bar, ThreadPoolExecutor(1) as writer:
            writing: deque[Future[int]] = deque()
            for shard, samples, skipped in _encoded_shards(stage, todo, by_key, encoder, pool, bar, given_up):
                if len(writing) == 2:
                    started = time.perf_counter()
                    report.written_bytes += writing.popleft().result()
                    report.spend("wait_for_write", started)
                writing.append(writer.submit(_write, stage.storage, shard, samples, skipped, report))
                report.latents.made += len(samples)
            report.written_bytes += sum(future.result() for future in writing)
        report.spend("video_pass", pass_started)

    folders = {key: f"{collection.folder}/{clip.window.bucket}" for key, clip in by_key.items()}
    inventory = make_missing(
        stage.storage,
        collection,
        folders,
        make,
        stage.part,
        keys_per_shard=settings.clips_per_shard,
        keys_per_batch=settings.vae_batch_size,
        retry_skipped=settings.retry_skipped,
        given_up=given_up,
    )
    lost = given_up.keys() - inventory.stored - inventory.skipped.keys()  # or else another worker had them meanwhile
    stage.faults.update({by_key[key].source.name: given_up[key] for key in lost})
    report.latents.reused = len(inventory.stored & set(by_key)) - report.latents.made
    return inventory


def load_vae(stage: Stage) -> VaeEncoder:
    """The VAE's encoder as the config wants it, on its device."""
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


def _write(
    storage: Storage, shard: PlannedShard, samples: Sequence[Sample], skipped: Mapping[str, str], report: Report
) -> int:
    """Bytes written. A shard whose clips were not all to be had holds the others, under the name of their keys."""
    made = len(samples) + len(skipped)
    if not made or (made < len(shard.keys) and storage.exists(shard.receipt)):  # another worker had them all
        return 0
    started = time.perf_counter()
    _, written_bytes = write_shard(storage, shard.folder, samples, skipped, shard.attempt)
    report.spend("write", started)
    return written_bytes


def decode_job(stage: Stage, clip: Clip) -> DecodeJob:
    """What a decoding process needs to know of a clip."""
    window = clip.window
    return DecodeJob(
        clip.source.path, clip.probe, window.indices, window.timestamps_us, stage.config.precompute.decoder
    )


def _encoded_shards(
    stage: Stage,
    todo: Iterator[PlannedShard],
    clips: Mapping[str, Clip],
    encoder: VaeEncoder,
    pool: DecodePool,
    bar: console.Progress,
    given_up: dict[str, str],
) -> Iterator[tuple[PlannedShard, list[Sample], dict[str, str]]]:
    """Shards: their samples, and key -> reason of what failed; what the machine spoilt is added to `given_up`, too."""
    under_way: deque[tuple[PlannedShard, tuple[str, ...], str]] = deque()

    def jobs() -> Iterator[DecodeJob]:
        for shard in todo:
            for batch in shard.batches:
                for key in batch:
                    under_way.append((shard, batch, key))
                    yield decode_job(stage, clips[key])

    samples: list[Sample] = []
    skipped: dict[str, str] = {}
    decoded: dict[str, Decoded] = {}
    started = time.perf_counter()
    for result in pool.decode_all(jobs(), ahead=2 * stage.config.precompute.vae_batch_size):
        shard, batch, key = under_way.popleft()
        if isinstance(result, Skipped):
            (skipped if result.permanent else given_up)[key] = result.reason
        else:
            decoded[key] = result
        if key == batch[-1]:
            stage.report.spend("wait_for_decode", started)
            started = time.perf_counter()
            for sample in encode_clips(stage, clips, decoded, encoder):
                if all(torch.isfinite(tensor).all() for tensor in sample.tensors.values()):
                    samples.append(sample)
                else:
                    skipped[sample.key] = "non-finite latents; precompute.vae_dtype = 'fp32' has more range"
            decoded = {}
            stage.report.spend("encode_latents", started)
            bar.advance(len(batch))
            if key == shard.keys[-1]:
                yield shard, samples, skipped
                samples, skipped = [], {}
            started = time.perf_counter()


def encode_clips(
    stage: Stage, clips: Mapping[str, Clip], decoded: Mapping[str, Decoded], encoder: VaeEncoder
) -> list[Sample]:
    """One encode batch of one bucket -> samples; raises `UsageError` if training could not use them."""
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
    """Raises `UsageError` for moments [B,2C,F,H,W] of another size than the bucket's, before hours go into them."""
    channels, *size = latent_shape(bucket, stage.encoders.conventions.out_channels)
    expected, found = (2 * channels, *size), tuple(moments.shape[1:])
    if found == expected:
        return
    assert stage.config.precompute.enable_tiling, f"{found} is not {expected}"
    raise UsageError(
        f"precompute.enable_tiling = true: the VAE's tiles do not fit clips of {bucket}, whose moments come as "
        f"{_by(found)} instead of {_by(expected)}; leave it false or choose other data.resolution_buckets"
    )


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def conditioning_images(first_frame: torch.Tensor, noised: int, key: str) -> list[torch.Tensor]:
    """[3,1,H,W] -> the clean frame and `noised` copies + sigma * noise, sigma = exp(N(-3, 0.5)) drawn by key.

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

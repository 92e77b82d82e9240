"""`precog plan --calibrate`: how long the plan takes, from a few clips and prompts of its own encoded for real."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from precompute import encoders
from precompute.latents import decode_job, encode_clips, load_vae
from precompute.prefetch import ahead
from precompute.prompts import encode_texts, free_memory, load_text_encoder
from precompute.recipes import Clip
from precompute.stage import Stage
from precompute.video.child import Decoded
from precompute.video.pool import DecodePool
from precompute.video.probe import BadVideo, MachineFault
from shared.errors import DataError

SAMPLE_CLIPS = 2
MAX_TRIED_CLIPS = 8


@dataclass(frozen=True, slots=True)
class Calibration:
    """Measured seconds of the sample, and what they make for the whole plan with one worker."""

    hours: float
    """Loading, then the prompts, then the clips: the slower of decoding (by all `decode_workers`) and encoding."""
    clips: int
    prompts: int
    load_seconds: float
    decode_seconds: float
    encode_seconds: float
    text_seconds: float


def calibrate(stage: Stage, clips: Sequence[Clip], texts: Sequence[str], pool: DecodePool) -> Calibration:
    """Time a sample of what is to be made; nothing is written.

    Encoding is taken to cost the same per pixel, decoding per frame, texts per batch. Raises
    `DataError` if no sampled clip can be decoded, `Preempted` after a signal.
    """
    batch = texts[: stage.config.precompute.text_batch_size]
    load_text_encoder_seconds, text = _time_texts(stage, batch) if batch else (0.0, 0.0)
    sample, decode = _time_decoding(stage, clips, pool) if clips else ({}, 0.0)
    load_vae_seconds, encode = _time_encoding(stage, sample) if sample else (0.0, 0.0)
    sampled = [clip for clip, _ in sample.values()]
    pixels, frames = _sum(_pixels, sampled), _sum(_frames, sampled)
    decode_whole = decode * _sum(_frames, clips) / max(frames, 1) / stage.config.precompute.decode_workers
    encode_whole = encode * _sum(_pixels, clips) / max(pixels, 1)
    text_whole = text * -(-len(texts) // max(len(batch), 1))
    return Calibration(
        hours=(load_text_encoder_seconds + text_whole + load_vae_seconds + max(decode_whole, encode_whole)) / 3600,
        clips=len(sampled),
        prompts=len(batch),
        load_seconds=load_text_encoder_seconds + load_vae_seconds,
        decode_seconds=decode,
        encode_seconds=encode,
        text_seconds=text,
    )


def _time_texts(stage: Stage, batch: Sequence[str]) -> tuple[float, float]:
    """Seconds to load T5, and for one batch once it is warm."""
    started = time.perf_counter()
    encoder = load_text_encoder(stage, encoders.load_tokenizer(str(stage.encoders.tokenizer)))
    load = time.perf_counter() - started
    keyed = {str(number): text for number, text in enumerate(batch)}
    for _ in range(2):
        stage.check()
        started = time.perf_counter()
        encode_texts(encoder, keyed)
    seconds = time.perf_counter() - started
    del encoder
    free_memory()
    return load, seconds


def _time_decoding(
    stage: Stage, clips: Sequence[Clip], pool: DecodePool
) -> tuple[dict[str, tuple[Clip, Decoded]], float]:
    """The sampled clips that can be decoded, and the decoders' seconds for them."""
    sample: dict[str, tuple[Clip, Decoded]] = {}
    total, reason = 0.0, ""
    for clip in islice(_spread(clips), MAX_TRIED_CLIPS):
        before = pool.busy_seconds()
        [result] = ahead(pool.decode_all([decode_job(stage, clip)]), 1, stage.check)
        if isinstance(result, BadVideo | MachineFault):
            reason = f"{clip.source.name}: {result.reason}"
            continue
        sample[clip.key] = clip, result
        total += pool.busy_seconds() - before
        if len(sample) == SAMPLE_CLIPS:
            break
    if not sample:
        raise DataError(f"--calibrate: none of the clips tried can be decoded ({reason})")
    return sample, total


def _time_encoding(stage: Stage, sample: Mapping[str, tuple[Clip, Decoded]]) -> tuple[float, float]:
    """Seconds to load the VAE, and for the sampled clips one at a time."""
    started = time.perf_counter()
    encoder = load_vae(stage)
    load = time.perf_counter() - started
    # A GPU's first clip of a shape chooses kernels, a compiled encoder's is compiled: once a bucket, not once a clip.
    # On a CPU there is no such cost, and a second encoding could take minutes.
    times = 2 if encoder.device.type == "cuda" or stage.config.precompute.compile_vae else 1
    total = 0.0
    for key, (clip, decoded) in sample.items():
        for _ in range(times):
            stage.check()
            started = time.perf_counter()
            encode_clips(stage, {key: clip}, {key: decoded}, encoder)
        total += time.perf_counter() - started
    del encoder
    free_memory()
    return load, total


def _spread(clips: Sequence[Clip]) -> Iterator[Clip]:
    """The clips of a third and two thirds of the way from the fewest pixels to the most, then all others."""
    ordered = sorted(clips, key=lambda clip: (_pixels(clip), clip.key))
    first = [len(ordered) // 3, 2 * len(ordered) // 3]
    yield from (ordered[index] for index in dict.fromkeys([*first, *range(len(ordered))]))


def _pixels(clip: Clip) -> int:
    bucket = clip.window.bucket
    return bucket.frames * bucket.height * bucket.width


def _frames(clip: Clip) -> int:
    """Frames that have to be decoded, about: all up to the last wanted one, or from a keyframe before the first."""
    first, last = clip.window.indices[0], clip.window.indices[-1]
    return last - first + 1 if clip.probe.one_to_one else last + 1


def _sum(measure: Callable[[Clip], int], clips: Sequence[Clip]) -> int:
    return sum(measure(clip) for clip in clips)

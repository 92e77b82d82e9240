"""The T5 pass: every text once, and T5 gone before the VAE comes."""

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from precompute import provenance, recipes
from precompute.assignments import PlannedShard, make_missing
from precompute.encoders import TextEncoder
from precompute.sources.rows import Source
from precompute.stage import Stage
from shared import console
from shared.cache.collection import Collection
from shared.cache.shard import Sample, write_shard
from shared.config import Data
from shared.device import choose_device
from shared.errors import DataError


def wanted_texts(data: Data, sources: Sequence[Source], recipe: str) -> dict[str, str]:
    """Key -> text of every prompt: captions, validation and negative prompts, and the empty one for dropout."""
    texts = [caption.text for source in sources for caption in source.captions]
    texts += [*data.validation_prompts, data.negative_prompt, ""]
    return {recipes.prompt_key(text, recipe): text for text in texts}


def encode_prompts(stage: Stage, collection: Collection, texts: Mapping[str, str], tokenizer: Any) -> None:
    """Encode the texts (key -> text) that are not stored; T5 is loaded only if there are any, and freed at the end."""
    settings, report = stage.config.precompute, stage.report

    def make(todo: Iterator[PlannedShard], total: int) -> None:
        started = time.perf_counter()
        encoder = load_text_encoder(stage, tokenizer)
        report.spend("load_text_encoder", started)
        provenance.record(stage.storage, collection, encoder.device)
        with console.Progress("prompts", total) as bar:
            for shard in todo:
                samples: list[Sample] = []
                for batch in shard.batches:
                    started = time.perf_counter()
                    samples += encode_texts(encoder, {key: texts[key] for key in batch})
                    report.spend("encode_prompts", started)
                    bar.advance(len(batch))
                started = time.perf_counter()
                report.written_bytes += write_shard(stage.storage, shard.folder, samples, attempt=shard.attempt)[1]
                report.prompts.made += len(samples)
                report.spend("write", started)

    make_missing(
        stage.storage,
        collection,
        dict.fromkeys(texts, collection.folder),
        make,
        stage.part,
        keys_per_shard=settings.prompts_per_shard,
        keys_per_batch=settings.text_batch_size,
    )
    report.prompts.reused = len(texts) - report.prompts.made
    free_memory()


def free_memory() -> None:
    """Give a dropped encoder's memory back to the device, for the next one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_text_encoder(stage: Stage, tokenizer: Any) -> TextEncoder:
    """T5 as the config wants it, on its device."""
    settings, part = stage.config.precompute, stage.encoders.text_encoder
    return TextEncoder(
        part,
        tokenizer,
        part.precision(settings.text_dtype),
        choose_device(settings.device),
        stage.encoders.conventions.text_length,
        int8=settings.text_quantization == "int8",
    )


def encode_texts(encoder: TextEncoder, texts: Mapping[str, str]) -> list[Sample]:
    """Raises `DataError` if an embedding is not finite: a prompt is never skipped."""
    embeds = encoder.encode(list(texts.values()))
    for text, embed in zip(texts.values(), embeds, strict=True):
        if not torch.isfinite(embed).all():
            raise DataError(
                f"prompt {text[:50]!r}: T5 gives a non-finite embedding; try precompute.text_dtype = 'bf16'"
            )
    return [
        Sample(key, {"prompt_embeds": embed}, {"text": text})
        for (key, text), embed in zip(texts.items(), embeds, strict=True)
    ]

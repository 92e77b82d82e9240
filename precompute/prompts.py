"""The T5 pass: every text is encoded once, and T5 is freed before the VAE is loaded."""

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from precompute import provenance, recipes
from precompute.assignments import shards_to_make, unmade
from precompute.encoders import TextEncoder
from precompute.report import SampleCounts, Timer
from precompute.sources.rows import Source
from precompute.stage import PassResult, Stage, Work
from shared import console
from shared.cache.shard import Sample, write_shard
from shared.config import Data
from shared.device import choose_device
from shared.errors import DataError


def wanted_texts(data: Data, sources: Sequence[Source], recipe: str) -> dict[str, str]:
    """Return key -> text of every prompt: captions, validation and negative prompts, and the empty one for dropout."""
    texts = [caption.text for source in sources for caption in source.captions]
    texts += [*data.validation_prompts, data.negative_prompt, ""]
    return {recipes.prompt_key(text, recipe): text for text in texts}


def encode_prompts(stage: Stage, work: Work, texts: Mapping[str, str], tokenizer: Any) -> PassResult:
    """Encode the texts (key -> text) that are not stored; T5 is loaded only if there are any, and freed at the end."""
    timer, encoder, wanted = Timer(), None, work.wanted
    made = written_bytes = 0
    shards, inventory = shards_to_make(stage.storage, wanted, work.inventory, stage.part)
    while shards:
        if encoder is None:
            with timer.measure("load_text_encoder"):
                encoder = load_text_encoder(stage, tokenizer)
            provenance.record(stage.storage, wanted.collection, encoder.device)
        with console.Progress("prompts", sum(len(shard.keys) for shard in shards)) as bar:
            for shard in unmade(stage.storage, shards):
                samples: list[Sample] = []
                for batch in shard.batches:
                    with timer.measure("encode_prompts"):
                        samples += encode_texts(encoder, {key: texts[key] for key in batch})
                    bar.advance(len(batch))
                with timer.measure("write"):
                    written_bytes += write_shard(stage.storage, shard.folder, samples, attempt=shard.attempt)[1]
                made += len(samples)
        shards, inventory = shards_to_make(stage.storage, wanted, inventory, stage.part)
    del encoder
    free_memory()
    return PassResult(inventory, SampleCounts(made, len(texts) - made), written_bytes, timer.seconds)


def free_memory() -> None:
    """Release a deleted encoder's memory on the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_text_encoder(stage: Stage, tokenizer: Any) -> TextEncoder:
    """Load T5 with the config's settings."""
    settings, part = stage.config.precompute, stage.encoders.text_encoder
    return TextEncoder(
        part,
        tokenizer,
        part.precision(settings.text_dtype),
        choose_device(settings.device),
        stage.encoders.conventions.text_length,
        offload=settings.text_offload,
    )


def encode_texts(encoder: TextEncoder, texts: Mapping[str, str]) -> list[Sample]:
    """Encode one batch of texts; raises `DataError` if an embedding is not finite, as a prompt is never skipped."""
    embeds = encoder.encode(list(texts.values()))
    for text, embed in zip(texts.values(), embeds, strict=True):
        if not torch.isfinite(embed).all():
            raise DataError(f"prompt {text[:50]!r}: its embedding is not finite; set precompute.text_dtype = 'bf16'")
    return [
        Sample(key, {"prompt_embeds": embed}, {"text": text})
        for (key, text), embed in zip(texts.items(), embeds, strict=True)
    ]

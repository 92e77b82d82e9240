"""The T5 pass: every text is encoded once, and T5 is freed before the VAE is loaded."""

import gc
from collections.abc import Mapping

import torch

from precompute import recipes
from precompute.assignments import shards_to_make, unmade
from precompute.discover import Stage
from precompute.encoders import TextEncoder, load_tokenizer
from precompute.estimate import Work
from precompute.report import PassResult, SampleCounts, Timer
from shared import console
from shared.cache.shard import Sample, ShardWriter
from shared.device import choose_device
from shared.errors import DataError


def encode_prompts(stage: Stage, work: Work, texts: Mapping[str, str]) -> PassResult:
    """Encode the texts (key -> text) that are not stored; T5 is loaded only if there are any, and freed at the end."""
    timer, encoder, wanted, settings = Timer(), None, work.wanted, stage.config.precompute
    made = written_bytes = 0
    shards, inventory = shards_to_make(stage.storage, wanted, work.inventory, stage.part)
    while shards:
        if encoder is None:
            with timer.measure("load_text_encoder"):
                device, length = choose_device(settings.device), stage.encoders.conventions.text_length
                tokenizer = load_tokenizer(str(stage.encoders.tokenizer))
                encoder = TextEncoder(stage.encoders.text_encoder, tokenizer, settings, device, length)
            recipes.record_environment(stage.storage, wanted.collection, encoder.device)
        with console.Progress("prompts", sum(len(shard.keys) for shard in shards)) as bar:
            for shard in unmade(stage.storage, shards):
                with ShardWriter(stage.storage, shard.folder) as writer:
                    for batch in shard.batches:
                        with timer.measure("encode_prompts"):
                            samples = encode_texts(encoder, {key: texts[key] for key in batch})
                        with timer.measure("write"):
                            for sample in samples:
                                writer.add(sample)
                        bar.advance(len(batch))
                    with timer.measure("write"):
                        written_bytes += writer.finish({}, shard.attempt)[1]
                made += len(shard.keys)
        shards, inventory = shards_to_make(stage.storage, wanted, inventory, stage.part)
    del encoder  # the VAE gets its memory
    if settings.text_offload:
        gc.collect()  # the hooks that move the layers lie in reference cycles with them
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return PassResult(inventory, SampleCounts(made, len(texts) - made), written_bytes, timer.seconds)


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

"""Prompts and their embeddings: from the cache where they are stored, else from T5, which is alone on the device."""

from collections.abc import Iterable
from typing import Any

import torch
from diffusers import CogVideoXPipeline
from torch import Tensor

from sample.memory import choose_memory, free_bytes, largest_layer, place, quantize, weight_bytes
from shared import console
from shared.cache.collection import SampleReader, read_recipe
from shared.cache.staleness import other_encoders
from shared.cache.storage import open_storage
from shared.cache.view import read_view
from shared.config import Config
from shared.device import DTYPES
from shared.errors import CacheError, UsageError
from shared.model.conventions import Conventions
from shared.model.pretrained import pretrained_folder, pretrained_part

TEXT_LAYERS_BYTES = 2**28
"""T5's activations for one prompt: 75 MiB at the published size, counted, and room."""


def read_prompts(config: Config) -> list[str]:
    """Return the prompts of `sample.prompts` and of `sample.prompts_file`; raises `UsageError` if there are none."""
    prompts, file = list(config.sample.prompts), config.sample.prompts_file
    if file is not None:
        try:
            prompts += [line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeError) as error:
            raise UsageError(f"sample.prompts_file: {file} cannot be read ({error}); name a text file") from None
    if not prompts:
        raise UsageError('sample.prompts: must not be empty; set for example sample.prompts=["a grey rabbit yawns"]')
    trigger = config.data.id_token
    if trigger and not any(trigger in prompt for prompt in prompts):
        console.say(f"warning: no prompt has data.id_token = {trigger!r}, which every caption began with")
    return prompts


def embed_prompts(
    config: Config, texts: Iterable[str], conventions: Conventions, device: torch.device
) -> dict[str, Tensor]:
    """Return {text: prompt_embeds [1,L,D] on the CPU}; T5 is loaded only for texts that the cache lacks."""
    wanted = dict.fromkeys(texts)
    stored = cached_embeds(config, wanted)
    missing = [text for text in wanted if text not in stored]
    console.say(f"prompts: {len(stored)} from the cache, {len(missing)} from T5")
    return stored | (encode(config, missing, conventions, device) if missing else {})


def cached_embeds(config: Config, texts: Iterable[str]) -> dict[str, Tensor]:
    """Return the embeddings stored by this config's T5; a cache that is missing or of another T5 has none."""
    try:
        storage = open_storage(config.precompute.cache, local_cache_gib=config.precompute.local_cache_gib)
        if storage.size(f"datasets/{config.data.name}.json") is None:
            return {}
        view = read_view(storage, config.data.name)
        prompts = read_recipe(storage, view.prompts)
        if config.precompute.text_dtype not in ("auto", prompts["precision"]):
            return {}
        for difference in other_encoders(config, view, read_recipe(storage, view.latents), prompts):
            raise CacheError(difference)
        keys = {text: key for row in view.rows for text, key in zip(row.captions, row.prompt_keys, strict=True)}
        keys = {text: key for text, key in (keys | view.special_prompts).items() if text in set(texts)}
        reader = SampleReader(storage, view.prompts, set(keys.values()), whole_up_to_bytes=0)
        return {text: reader.read(key)["prompt_embeds"][None] for text, key in keys.items()}
    except CacheError as error:
        console.say(f"warning: prompts are not read from the cache: {error}")
        return {}


@torch.no_grad()
def encode(config: Config, texts: Iterable[str], conventions: Conventions, device: torch.device) -> dict[str, Tensor]:
    """Return {text: prompt_embeds [1,L,D] on the CPU} by T5, in the precision of stage 1."""
    from transformers import T5EncoderModel, T5Tokenizer

    settings, part = config.sample, pretrained_part(config.model, "text_encoder")
    precision = part.precision(config.precompute.text_dtype)
    encoder: Any = T5EncoderModel.from_pretrained(
        str(part.folder), variant=part.variant, use_safetensors=True, dtype=DTYPES[precision]
    )
    encoder.eval().requires_grad_(False)
    if settings.base_precision != "model":
        quantize(encoder.encoder.block, "int8")  # T5 casts its input to the weight's type unless that is int8
    tokenizer = T5Tokenizer.from_pretrained(pretrained_folder(config.model, "tokenizer"))
    pipeline = CogVideoXPipeline(tokenizer, encoder, vae=None, transformer=None, scheduler=None)
    blocks = [weight_bytes(block) for block in encoder.encoder.block]
    needed = {
        "none": weight_bytes(encoder) + TEXT_LAYERS_BYTES,
        "group_offload": weight_bytes(encoder) - sum(blocks) + 2 * max(blocks) + TEXT_LAYERS_BYTES,
        "sequential_offload": largest_layer(encoder) + TEXT_LAYERS_BYTES,
    }
    mode = settings.memory if settings.memory != "auto" else choose_memory(needed, free_bytes(device))[0]
    place(pipeline, mode, device)
    return {
        text: pipeline.encode_prompt(
            text,
            do_classifier_free_guidance=False,
            max_sequence_length=conventions.text_length,
            device=device,
            dtype=DTYPES[precision],
        )[0].cpu()
        for text in texts
    }

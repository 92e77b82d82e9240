"""Samples and shards for tests of the cache."""

import tempfile
from collections.abc import Mapping, Sequence

import torch

from bench.shards import write_shard
from shared.cache.collection import SampleReader, collection_for, shards, write_recipe
from shared.cache.shard import Receipt, Sample
from shared.cache.storage import LocalStorage, Storage
from shared.cache.view import View, ViewRow, read_view, write_view
from shared.fingerprint import Json, key_of

FOLDER = "latents/0123/9x32x48"
RECIPE: dict[str, Json] = {"kind": "latents", "test": "cache"}
COLLECTION = collection_for("latents", RECIPE)
PROMPTS_RECIPE: dict[str, Json] = {"kind": "prompts", "test": "cache"}
PROMPTS = collection_for("prompts", PROMPTS_RECIPE)


def make_samples(count: int = 3, seed: int = 0, scale: float = 1.0) -> list[Sample]:
    """Return samples with two tensors each; `scale` stands for another machine's rounding."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Sample(
            key_of([seed, number]),
            {
                "moments": (scale * torch.randn(32, 3, 4, 6 + number, generator=generator)).to(torch.bfloat16),
                "image_moments": scale * torch.randn(2, 32, 1, 4, 6, generator=generator),
            },
            {"bucket": "9x32x48", "number": number},
        )
        for number in range(count)
    ]


def store(storage: Storage, count: int = 1) -> list[str]:
    """Store `count` shards of two samples in COLLECTION; return their tars."""
    write_recipe(storage, COLLECTION, RECIPE)
    for seed in range(count):
        write_shard(storage, f"{COLLECTION.folder}/9x32x48", make_samples(2, seed))
    return [tar for tar, _ in shards(storage, COLLECTION.folder)]


def store_view(storage: Storage, name: str, keys: Sequence[str], captions: Sequence[str] = ()) -> View:
    """Write a view of those samples, and the prompts of its captions."""
    write_recipe(storage, PROMPTS, PROMPTS_RECIPE)
    texts = {key_of(text): text for text in ("", *captions)}
    for key in texts:
        write_shard(storage, PROMPTS.folder, [Sample(key, {"prompt_embeds": torch.ones(2, 4)}, {"text": texts[key]})])
    prompts = tuple(key_of(text) for text in captions) or (key_of(""),)
    rows = tuple(
        ViewRow("a.mp4", 0.0, 1.0, 9, 32, 48, False, key, prompts, (1.0,) * len(prompts), prompts, (0,), "train", "")
        for key in keys
    )
    view = View(name, COLLECTION, PROMPTS, {"": key_of("")}, rows)
    write_view(storage, view)
    return view


def read_whole(storage: Storage, view: View) -> None:
    """Read a view as it was written, and every sample that it names."""
    assert read_view(storage, view.name) == view
    for collection in (view.latents, view.prompts):
        reader = SampleReader(storage, collection)
        for key in view.keys[collection.folder]:
            reader.read(key)


def pack_shard(
    folder: str, samples: Sequence[Sample], skipped: Mapping[str, str] | None = None, attempt: int = 0
) -> tuple[bytes, Receipt]:
    """Return a shard's tar and receipt."""
    with tempfile.TemporaryDirectory() as cache:
        storage = LocalStorage(cache)
        receipt, _ = write_shard(storage, folder, samples, skipped, attempt)
        return storage.path(receipt.tar).read_bytes(), receipt

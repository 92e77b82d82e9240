"""Collections of samples: found by key, read by offset, verified by hash.

A collection is the folder `latents/<recipe>` or `prompts/<recipe>`. All its shards were made by the settings in its
`recipe.json`.
"""

import hashlib
import json
import math
from collections.abc import Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from shared.cache.shard import MappedShard, Receipt, SamplePlace, read_receipt, sample_tensors
from shared.cache.storage import VERIFY, Storage
from shared.errors import CacheError
from shared.fingerprint import Json, key_of

FORMAT = 2
"""The cache format, in every recipe and so in every key."""
KINDS = ("latents", "prompts")
RECIPE_BYTES = 2**20
READERS = 16
"""Receipts read at the same time; an object store answers each after tens of milliseconds."""
MAPPED_SHARDS = 2
"""Shards that a reader keeps mapped; their pages count as its memory."""


@dataclass(frozen=True, slots=True)
class Collection:
    """The shards made by one recipe."""

    kind: str
    """"latents" or "prompts"."""
    recipe: str
    """Hash of the recipe."""

    @property
    def folder(self) -> str:
        return f"{self.kind}/{self.recipe}"


def collection_for(kind: str, recipe: Mapping[str, Json]) -> Collection:
    """Return the collection of a recipe, which may not exist yet."""
    return Collection(kind, key_of(recipe))


def collections(storage: Storage) -> list[Collection]:
    """List the collections that have a recipe."""
    names = [name for kind in KINDS for name in storage.files(kind) if name.endswith("/recipe.json")]
    return [Collection(*name.split("/")[:2]) for name in names]


def write_recipe(storage: Storage, collection: Collection, recipe: Mapping[str, Json]) -> None:
    """Write `recipe.json` unless it exists."""
    assert key_of(recipe) == collection.recipe
    storage.publish(f"{collection.folder}/recipe.json", json.dumps(recipe, indent=1, sort_keys=True).encode())


def read_recipe(storage: Storage, collection: Collection) -> dict[str, Any]:
    """Read a recipe; raises `CacheError` if it is missing, damaged or not the one that names its folder."""
    name = f"{collection.folder}/recipe.json"
    try:
        recipe: dict[str, Any] = json.loads(storage.read(name, limit_bytes=RECIPE_BYTES))
        if key_of(recipe) != collection.recipe:
            raise ValueError("its hash is not its folder's name")
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{storage}/{name}: damaged ({error}); {VERIFY}") from None
    return recipe


def receipt_names(files: Iterable[str]) -> list[str]:
    """Return the names of receipts among the files of collections."""
    return [name for name in files if name.endswith(".json") and not name.endswith("/recipe.json")]


def shards(storage: Storage, folder: str, known: Container[str] = frozenset()) -> list[tuple[str, Receipt]]:
    """Return tar name and receipt of every shard below `folder` whose receipt's name is not `known`.

    Lists the folder once and reads each receipt once, several at a time. A tar without a receipt does not exist.
    Raises `CacheError` if a receipt is damaged, or its tar is missing or has another size.
    """
    sizes = storage.files(folder)
    names = [name for name in receipt_names(sizes) if name not in known]
    with ThreadPoolExecutor(READERS) as pool:
        receipts = list(pool.map(partial(read_receipt, storage), names))
    for receipt in receipts:
        size = sizes.get(receipt.tar)
        if size != receipt.size and (size := storage.size(receipt.tar)) != receipt.size:  # the listing may be older
            found = "not found" if size is None else f"{size} bytes, expected {receipt.size}"
            raise CacheError(f"{storage}/{receipt.tar}: {found}; {VERIFY}")
    return [(receipt.tar, receipt) for receipt in receipts]


class SampleReader:
    """Reads samples of a collection by key, zero-copy; its memory does not grow with what it has read."""

    def __init__(
        self,
        storage: Storage,
        collection: Collection,
        keys: Container[str] | None = None,
        whole_up_to_bytes: float = math.inf,
    ) -> None:
        """Read the collection's receipts; `keys` are those that will be read, None for all.

        Their shards are mapped, which fetches remote ones whole, if they take at most `whole_up_to_bytes`. Otherwise
        each read fetches one sample.
        """
        self._storage = storage
        self._collection = collection
        self._receipts: dict[str, Receipt] = {}
        self._places: dict[str, tuple[str, SamplePlace]] = {}
        for tar, receipt in shards(storage, collection.folder):
            wanted = [place for place in receipt.samples if keys is None or place.key in keys]
            if wanted:
                self._receipts[tar] = replace(receipt, samples=(), skipped={})
                self._places |= {place.key: (tar, place) for place in wanted}
        self._whole = sum(self.shard_bytes.values()) <= whole_up_to_bytes
        self._mapped: dict[str, MappedShard] = {}
        self._checked: set[str] = set()

    @property
    def shard_bytes(self) -> dict[str, int]:
        """Tar -> size in bytes, of the shards that hold the wanted samples."""
        return {tar: receipt.size for tar, receipt in self._receipts.items()}

    @property
    def copies_bytes(self) -> int:
        """Size of the local copies of those shards once all have been read."""
        return sum(self.shard_bytes.values()) if self._whole else 0

    def shard_of(self, key: str) -> str:
        """Return the tar that holds the sample."""
        return self._place(key)[0]

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def shapes(self, key: str) -> dict[str, tuple[int, ...]]:
        """Return the tensors' shapes without reading the data."""
        return {name: tensor.shape for name, tensor in self._place(key)[1].tensors.items()}

    def read(self, key: str) -> dict[str, torch.Tensor]:
        """Return the sample's tensors, views of the mapped file; raises `CacheError` if it is missing or damaged.

        The first read of a sample compares its bytes with the receipt's hash.
        """
        tar, place = self._place(key)
        found = place.sha256
        if not self._whole:
            content = bytearray(self._storage.read_part(tar, place.offset, place.length))
            found, tensors = hashlib.sha256(content).hexdigest(), sample_tensors(place, content, place.offset)
        else:
            shard = self._shard(tar)
            if key not in self._checked:
                found = shard.payload_sha256(place)
            tensors = shard.tensors(place)
        if found != place.sha256:
            raise CacheError(f"{self._storage}/{tar}: sample {place.key} is damaged; {VERIFY}")
        self._checked.add(key)
        return tensors

    def _place(self, key: str) -> tuple[str, SamplePlace]:
        try:
            return self._places[key]
        except KeyError:
            where = f"{self._storage}/{self._collection.folder}"
            raise CacheError(f"{where}: sample {key} is not stored; run `precog precompute` with this config") from None

    def _shard(self, tar: str) -> MappedShard:
        """Return the mapped shard and unmap the least recently used; its tensors keep a shard mapped."""
        shard = self._mapped.pop(tar, None) or MappedShard(self._storage, tar, self._receipts[tar])
        self._mapped[tar] = shard
        if len(self._mapped) > MAPPED_SHARDS:
            del self._mapped[next(iter(self._mapped))]
        return shard

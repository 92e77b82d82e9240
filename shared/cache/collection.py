"""What is stored: the samples of one recipe, found by key, read by offset, verified by hash.

A collection is `latents/<recipe>` or `prompts/<recipe>`: all in it was made by the settings in its `recipe.json`.
"""

import hashlib
import json
import math
from collections.abc import Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from shared.cache.shard import MappedShard, Receipt, SamplePlace, read_receipt, sample_tensors
from shared.cache.storage import Storage
from shared.errors import CacheError
from shared.fingerprint import Json, key_of

KINDS = ("latents", "prompts")
RECIPE_BYTES = 2**20
PLAN_BYTES = 256 * 2**20


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
    """The collection of that recipe, whether or not anything is stored yet."""
    return Collection(kind, key_of(recipe))


def write_recipe(storage: Storage, collection: Collection, recipe: Mapping[str, Json]) -> None:
    """Put `recipe.json` beside the shards, readable."""
    assert key_of(recipe) == collection.recipe
    storage.publish(f"{collection.folder}/recipe.json", json.dumps(recipe, indent=1, sort_keys=True).encode())


def read_recipe(storage: Storage, collection: Collection) -> dict[str, Any]:
    """Raises `CacheError` if it is missing, damaged or not the one its folder is named by."""
    name = f"{collection.folder}/recipe.json"
    try:
        recipe: dict[str, Any] = json.loads(storage.read(name, limit_bytes=RECIPE_BYTES))
        if key_of(recipe) != collection.recipe:
            raise ValueError("its hash is not its folder's name")
    except (ValueError, RecursionError) as error:
        repair = "`precog cache verify --repair` sets it aside, then precompute writes it again"
        raise CacheError(f"{storage}/{name}: damaged ({error}); {repair}") from None
    return recipe


def shards(storage: Storage, folder: str) -> Iterator[tuple[str, Receipt]]:
    """Tar name and receipt of every finished shard below `folder`; a tar without a receipt does not exist yet.

    Raises `CacheError` if a receipt is damaged or its tar is missing or has another size.
    """
    names = [name for name in storage.names(folder, ".json") if not name.endswith("/recipe.json")]
    tars = [name.removesuffix(".json") + ".tar" for name in names]
    with ThreadPoolExecutor(8) as pool:
        receipts = pool.map(lambda name: read_receipt(storage, name), names)
        for tar, receipt, size in zip(tars, receipts, pool.map(storage.size, tars), strict=True):
            if size != receipt.size:
                found = "is missing" if size is None else f"has {size} bytes where its receipt says {receipt.size}"
                raise CacheError(f"{storage}/{tar}: {found}; `precog cache verify --repair` sets it aside")
            yield tar, receipt


MAPPED_SHARDS = 2
"""A reader holds so many shards mapped, because pages that were read count as its memory for as long as they are."""


class SampleReader:
    """Reads samples of a collection by key, zero-copy; what it holds in memory does not grow with what it has read."""

    def __init__(
        self,
        storage: Storage,
        collection: Collection,
        keys: Container[str] | None = None,
        whole_up_to_bytes: float = math.inf,
    ) -> None:
        """`keys` are those that will be asked for, all if None.

        Their shards are mapped, which fetches remote ones whole, if they take `whole_up_to_bytes` at most; else each
        sample is read alone, whenever it is asked for.
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
        """Tar -> its size, of the shards with the samples that will be asked for."""
        return {tar: receipt.size for tar, receipt in self._receipts.items()}

    @property
    def copies_bytes(self) -> int:
        """What local copies of those shards take when all have been read."""
        return sum(self.shard_bytes.values()) if self._whole else 0

    def shard_of(self, key: str) -> str:
        """The tar that holds the sample."""
        return self._place(key)[0]

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def shapes(self, key: str) -> dict[str, tuple[int, ...]]:
        """Tensor shapes without touching the data."""
        return {name: tensor.shape for name, tensor in self._place(key)[1].tensors.items()}

    def read(self, key: str) -> dict[str, torch.Tensor]:
        """The sample's tensors, views of the mapped file; raises `CacheError` if it is not stored or damaged.

        Its bytes are compared with the receipt's hash the first time that this reader is asked for them.
        """
        tar, place = self._place(key)
        if not self._whole:
            content = bytearray(self._storage.read_part(tar, place.offset, place.length))
            self._compare(tar, place, hashlib.sha256(content).hexdigest())
            return sample_tensors(place, content, place.offset)
        if key not in self._checked:
            self._compare(tar, place, self._shard(tar).payload_sha256(place))
            self._checked.add(key)
        return self._shard(tar).tensors(place)

    def _compare(self, tar: str, place: SamplePlace, found: str) -> None:
        if found != place.sha256:
            raise CacheError(
                f"{self._storage}/{tar}: sample {place.key} is damaged; `precog cache verify --repair` sets the shard "
                "aside, then precompute makes it again"
            )

    def _place(self, key: str) -> tuple[str, SamplePlace]:
        try:
            return self._places[key]
        except KeyError:
            where = f"{self._storage}/{self._collection.folder}"
            raise CacheError(f"{where}: sample {key} is not stored; run `precog precompute` with this config") from None

    def _shard(self, tar: str) -> MappedShard:
        """Mapped, and the last in line to be let go; a tensor that is still used keeps its own shard mapped."""
        shard = self._mapped.pop(tar, None) or MappedShard(self._storage, tar, self._receipts[tar])
        self._mapped[tar] = shard
        if len(self._mapped) > MAPPED_SHARDS:
            del self._mapped[next(iter(self._mapped))]
        return shard


def collections(storage: Storage) -> list[Collection]:
    """Everything in the cache that has a recipe."""
    names = [name for kind in KINDS for name in storage.names(kind, "/recipe.json")]
    return [Collection(*name.split("/")[:2]) for name in names]

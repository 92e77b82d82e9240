"""Collections of samples: found by key, read by offset, verified by hash.

A collection is the folder `latents/<recipe>` or `prompts/<recipe>`. All its shards were made by the settings in its
`recipe.json`.
"""

import json
import math
from collections.abc import Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import Any

import torch

from shared.cache.shard import DTYPES, OpenShard, Receipt, SamplePlace, read_receipt, sample_tensors
from shared.cache.storage import VERIFY, Storage
from shared.errors import CacheError
from shared.fingerprint import Json, key_of

FORMAT = 2
"""The cache format, in every recipe and so in every key."""
KINDS = ("latents", "prompts")
RECIPE_BYTES, VIEW_BYTES = 2**20, 2**30
READERS = 16
"""Receipts read at the same time; an object store answers each after tens of milliseconds."""
OPEN_SHARDS = 2
"""Shards that a reader keeps open, so that deleted local copies of remote ones stay readable."""


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
    """List the collections that have a recipe of this format."""
    own, _ = without_foreign(storage, [name for kind in KINDS for name in storage.files(kind)])
    return [Collection(*name.split("/")[:2]) for name in own if name.endswith("/recipe.json")]


def foreign_formats(storage: Storage) -> dict[str, Json]:
    """Return folder -> format of the collections of other formats."""
    return without_foreign(storage, [name for kind in KINDS for name in storage.files(kind)])[1]


def without_foreign(storage: Storage, names: Iterable[str]) -> tuple[list[str], dict[str, Json]]:
    """Return the names without the files of other formats, and folder -> format of the collections of these.

    Such collections and the views of them are left alone. Damaged files count as those of this format.
    """
    names, foreign = list(names), dict[str, Json]()
    for name in (name for name in names if name.endswith("/recipe.json")):
        folder = name.removesuffix("/recipe.json")
        with suppress(ValueError, AttributeError, RecursionError, CacheError):  # damaged
            recipe = json.loads(storage.read(name, limit_bytes=RECIPE_BYTES))
            with_ours = key_of({**recipe, "format": FORMAT})  # names the folder where a bit of the format flipped
            if recipe.get("format", FORMAT) != FORMAT and with_ours != folder.rpartition("/")[2]:
                foreign[folder] = recipe["format"]
    recipes = {folder.rpartition("/")[2] for folder in foreign}
    return [name for name in names if not (recipes and _is_foreign(storage, name, recipes))], foreign


def _is_foreign(storage: Storage, name: str, recipes: set[str]) -> bool:
    """Return True for a file of a collection with one of `recipes`, and for a view that names one."""
    if not name.startswith("datasets/"):
        return not recipes.isdisjoint(name.split("/"))
    content = b""
    if name.endswith(".json"):
        with suppress(CacheError):  # damaged
            content = storage.read(name, limit_bytes=VIEW_BYTES)
    return any(recipe.encode() in content for recipe in recipes)


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
    """Reads samples of a collection by key, in any thread; its memory does not grow with what it has read."""

    def __init__(
        self,
        storage: Storage,
        collection: Collection,
        keys: Container[str] | None = None,
        whole_up_to_bytes: float = math.inf,
        stored: Iterable[tuple[str, Receipt]] | None = None,
    ) -> None:
        """Find the samples `keys`, None for all, in the collection's shards, which are read if `stored` is None.

        Remote shards are fetched whole if they take at most `whole_up_to_bytes`; otherwise a read fetches one sample.
        """
        self._storage = storage
        self._collection = collection
        self._receipts: dict[str, Receipt] = {}
        self._places: dict[str, tuple[str, SamplePlace]] = {}
        for tar, receipt in shards(storage, collection.folder) if stored is None else stored:
            wanted = [place for place in receipt.samples if keys is None or place.key in keys]
            if wanted:
                self._receipts[tar] = replace(receipt, samples=(), skipped={})
                self._places |= {place.key: (tar, place) for place in wanted}
        self._whole = sum(self.shard_bytes.values()) <= whole_up_to_bytes
        self._open: dict[str, OpenShard] = {}
        self._lock = Lock()

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
        """Return the sample's tensors; raises `CacheError` if it is missing, or not the one of the receipt."""
        tar, place = self._place(key)
        if self._whole:
            return self._shard(tar).read(place)
        content = bytearray(self._storage.read_part(tar, place.offset, place.length))
        return sample_tensors(place, content, f"{self._storage}/{tar}")

    def read_part(self, key: str, name: str) -> torch.Tensor:
        """Return one tensor of a sample, such as "thumbnails".

        Only its own bytes are read, so they are not compared with the sample's hash: for pages, not for training.
        """
        tar, place = self._place(key)
        tensor = place.tensors[name]
        content = bytearray(self._storage.read_part(tar, tensor.offset, tensor.num_bytes))
        return torch.frombuffer(content, dtype=DTYPES[tensor.dtype]).view(tensor.shape)

    def _place(self, key: str) -> tuple[str, SamplePlace]:
        try:
            return self._places[key]
        except KeyError:
            where = f"{self._storage}/{self._collection.folder}"
            raise CacheError(f"{where}: sample {key} is not stored; run `precog precompute` with this config") from None

    def _shard(self, tar: str) -> OpenShard:
        """Return the open shard and close the least recently used."""
        with self._lock:
            shard = self._open.pop(tar, None) or OpenShard(self._storage, self._receipts[tar])
            self._open[tar] = shard
            if len(self._open) > OPEN_SHARDS:
                del self._open[next(iter(self._open))]
        return shard

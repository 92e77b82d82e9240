"""Collections of samples: found by key, read by offset, verified by hash.

A collection is the folder `latents/<recipe>` or `prompts/<recipe>`. All its shards were made by the settings in its
`recipe.json`.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from shared.cache.index import READERS, SampleTable, check_tars, read_samples, receipt_names
from shared.cache.shard import DTYPES, OpenShard, Receipt, SamplePlace, read_receipt, sample_tensors
from shared.cache.storage import VERIFY, Storage
from shared.errors import CacheError
from shared.fingerprint import Json, key_of

FORMAT = 2
"""The cache format, in every recipe and so in every key."""
KINDS = ("latents", "prompts")
RECIPE_BYTES, VIEW_BYTES = 2**20, 2**30
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


def shards(storage: Storage, folder: str) -> list[tuple[str, Receipt]]:
    """Return tar name and receipt of every shard below `folder`, read as by `read_samples`; raises `CacheError`."""
    sizes = storage.files(folder)
    with ThreadPoolExecutor(READERS) as pool:
        receipts = list(pool.map(partial(read_receipt, storage), receipt_names(sizes)))
    check_tars(storage, receipts, sizes)
    return [(receipt.tar, receipt) for receipt in receipts]


class SampleReader:
    """Reads samples of a collection by key, in any thread; its memory does not grow with what it has read."""

    def __init__(
        self,
        storage: Storage,
        collection: Collection,
        keys: Iterable[str] | None = None,
        whole_up_to_bytes: float = math.inf,
        stored: SampleTable | None = None,
    ) -> None:
        """Find the samples `keys`, None for all, in the collection's shards, which are read if `stored` is None.

        Remote shards are fetched whole if they take at most `whole_up_to_bytes`; otherwise a read fetches one sample.
        """
        self._storage = storage
        self._collection = collection
        self._stored = read_samples(storage, collection.folder) if stored is None else stored
        rows = self._stored.rows
        if keys is not None:
            rows = rows[[row for row in self._stored.find([*keys]).tolist() if row >= 0]]
        receipts = [self._stored.receipts[shard] for shard in np.unique(rows["shard"]).tolist()]
        self.shard_bytes = {receipt.tar: receipt.size for receipt in receipts}
        """Tar -> size in bytes, of the shards that hold the wanted samples."""
        self._whole = sum(self.shard_bytes.values()) <= whole_up_to_bytes
        self._open: dict[str, OpenShard] = {}
        self._lock = Lock()

    @property
    def copies_bytes(self) -> int:
        """Size of the local copies of those shards once all have been read."""
        return sum(self.shard_bytes.values()) if self._whole else 0

    def shards_of(self, keys: Sequence[str]) -> list[str]:
        """Return the tars that hold the samples."""
        return [self._stored.receipts[shard].tar for shard in self._rows(keys)["shard"].tolist()]

    def __contains__(self, key: str) -> bool:
        return self._stored.place(key) is not None

    def shapes(self, keys: Sequence[str]) -> list[dict[str, tuple[int, ...]]]:
        """Return the shapes of each sample's tensors without reading the data."""
        shapes = [{name: tensor.shape for name, tensor in layout} for layout in self._stored.layouts]
        return [shapes[layout] for layout in self._rows(keys)["layout"].tolist()]

    def read(self, key: str) -> dict[str, torch.Tensor]:
        """Return the sample's tensors; raises `CacheError` if it is missing, or not the one of the receipt."""
        receipt, place = self._place(key)
        if self._whole:
            return self._shard(receipt).read(place)
        content = bytearray(self._storage.read_part(receipt.tar, place.offset, place.length))
        return sample_tensors(place, content, f"{self._storage}/{receipt.tar}")

    def read_part(self, key: str, name: str) -> torch.Tensor:
        """Return one tensor of a sample, such as "thumbnails".

        Only its own bytes are read, so they are not compared with the sample's hash: for pages, not for training.
        """
        receipt, place = self._place(key)
        tensor = place.tensors[name]
        content = bytearray(self._storage.read_part(receipt.tar, tensor.offset, tensor.num_bytes))
        return torch.frombuffer(content, dtype=DTYPES[tensor.dtype]).view(tensor.shape)

    def _place(self, key: str) -> tuple[Receipt, SamplePlace]:
        return self._stored.place(key) or self._refuse(key)

    def _rows(self, keys: Sequence[str]) -> npt.NDArray[np.void]:
        found = self._stored.find(keys)
        if (found < 0).any():
            self._refuse(keys[int(np.argmin(found))])
        return self._stored.rows[found]

    def _refuse(self, key: str) -> NoReturn:
        where = f"{self._storage}/{self._collection.folder}"
        raise CacheError(f"{where}: sample {key} is not stored; run `precog precompute` with this config")

    def _shard(self, receipt: Receipt) -> OpenShard:
        """Return the open shard and close the least recently used."""
        with self._lock:
            shard = self._open.pop(receipt.tar, None) or OpenShard(self._storage, receipt)
            self._open[receipt.tar] = shard
            if len(self._open) > OPEN_SHARDS:
                del self._open[next(iter(self._open))]
        return shard

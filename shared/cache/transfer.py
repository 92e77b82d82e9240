"""Copy what another cache lacks: `precog cache pull` and `push`, also between two folders, which merges them."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from shared.cache.collection import (
    VIEW_BYTES,
    Collection,
    collections,
    foreign_formats,
    read_recipe,
    shards,
    write_recipe,
)
from shared.cache.index import write_index
from shared.cache.shard import Receipt, publish_tar, receipt_bytes
from shared.cache.storage import VERIFY, Storage
from shared.cache.verify import MADE_BY_BYTES, Track
from shared.cache.view import read_table_name, read_view, view_names
from shared.errors import CacheError
from shared.fingerprint import Json, sha256_file


@dataclass(frozen=True, slots=True)
class Transfer:
    """The shards and views that one cache has and another lacks."""

    shards: dict[str, Receipt]
    """Name of the receipt -> receipt."""
    views: list[str]
    different: list[str] = field(default_factory=list)
    """Views that both caches have, with other contents."""
    foreign: dict[str, Json] = field(default_factory=dict)
    """Folder -> format of the collections that are left alone."""

    @property
    def num_bytes(self) -> int:
        return sum(receipt.size for receipt in self.shards.values())


def find_transfer(source: Storage, target: Storage) -> Transfer:
    """Find the shards with a key that `target` lacks, and the views; raises `CacheError` for damage in either."""
    missing = {}
    for collection in collections(source):
        stored = {key for _, receipt in shards(target, collection.folder) for key in _keys(receipt)}
        for _, receipt in shards(source, collection.folder):
            if not stored.issuperset(_keys(receipt)):
                missing[receipt.name] = receipt
    views, different = [], []
    for name in view_names(source):
        file = f"datasets/{name}.json"
        if target.size(file) is None:
            views.append(name)
        elif target.read(file, limit_bytes=VIEW_BYTES) != source.read(file, limit_bytes=VIEW_BYTES):
            different.append(name)
    return Transfer(missing, views, different, foreign_formats(source))


def transfer(source: Storage, target: Storage, found: Transfer, views: Iterable[str], track: Track = iter) -> None:
    """Copy shards, then `views`; raises `CacheError` for damage. The same call continues after a kill.

    A shard's tar is compared with its hash before it gets its name, and its receipt follows. A view comes last.
    """
    for collection in collections(source):
        write_recipe(target, collection, read_recipe(source, collection))
        for name in source.files(f"made_by/{collection.recipe}"):
            target.publish(name, source.read(name, limit_bytes=MADE_BY_BYTES))
    for name in track([*found.shards]):
        _copy_shard(source, target, found.shards[name])
    for collection in collections(source):
        write_index(target, collection.folder)
    for name in views:
        read_view(source, name)
        file = f"datasets/{name}.json"
        for each in (read_table_name(source, file), file):
            target.publish(each, source.read(each, limit_bytes=VIEW_BYTES), replace=True)


def _copy_shard(source: Storage, target: Storage, receipt: Receipt) -> None:
    with target.unfinished(receipt.tar) as copy:
        source.fetch(receipt.tar, copy)
        if sha256_file(copy) != receipt.sha256:
            raise CacheError(f"{source}/{receipt.tar}: damaged; {VERIFY}")
        publish_tar(target, copy, receipt)
    target.publish(receipt.name, receipt_bytes(receipt))


def _keys(receipt: Receipt) -> set[str]:
    return {*(place.key for place in receipt.samples), *receipt.skipped}


def find_sample(storage: Storage, start: str) -> list[tuple[Collection, Receipt, str]]:
    """Return collection, receipt and key of the samples and skipped clips whose key begins with `start`."""
    found = []
    for collection in collections(storage):
        for _, receipt in shards(storage, collection.folder):
            found += [(collection, receipt, key) for key in sorted(_keys(receipt)) if key.startswith(start)]
    return found

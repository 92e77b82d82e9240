"""Find and delete the files of a cache that no view needs: `precog cache gc`."""

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from shared.cache.collection import KINDS, shards, without_foreign
from shared.cache.index import INDEX
from shared.cache.remote import Entry, is_temporary
from shared.cache.shard import Receipt
from shared.cache.storage import Storage
from shared.cache.verify import FOLDERS, Track, read_assignment
from shared.cache.view import read_table_name, read_view, view_names
from shared.fingerprint import Json

Keys = Mapping[str, set[str]]
"""Folder of a collection -> keys."""


@dataclass(frozen=True, slots=True)
class Garbage:
    """The files that no view needs."""

    files: dict[str, str]
    """Name -> reason, in the order of deletion: a receipt before its tar."""
    sizes: dict[str, int]
    """Name -> bytes."""
    unfinished: int
    """Shards that no view names yet, kept because a run that is going on may need them."""
    foreign: dict[str, Json]
    """Folder -> format of the collections that are left alone."""


def find_garbage(storage: Storage, min_age_seconds: float) -> Garbage:
    """Find the files that no view needs and that are older than `min_age_seconds`; raises `CacheError` for damage.

    While a shard or assignment younger than that is named by no view, a run or a `pull` may be going on, whose older
    shards are not named either. Then only litter is garbage: files that no reader looks at.
    """
    entries = {name: entry for folder in FOLDERS for name, entry in storage.entries(folder).items()}
    own, foreign = without_foreign(storage, entries)
    entries = {name: entries[name] for name in own}
    views = view_names(storage)
    used: defaultdict[str, set[str]] = defaultdict(set)
    for name in views:
        for folder, keys in read_view(storage, name).keys.items():
            used[folder] |= keys
    # a name that appeared since the listing above belongs to a writer
    old = {name for name, entry in entries.items() if time.time() - entry.modified > min_age_seconds}
    folders = {"/".join(name.split("/")[:2]) for name in entries if name.startswith(KINDS)}
    receipts = [receipt for folder in sorted(folders) for _, receipt in shards(storage, folder)]
    unnamed = [receipt for receipt in receipts if not _is_used(receipt, used)]
    kept = {*(f"datasets/{name}.json" for name in views), *(receipt.tar for receipt in receipts)}
    kept |= {read_table_name(storage, f"datasets/{name}.json") for name in views}
    if foreign:  # whose tables may be among these
        kept |= {name for name in entries if name.endswith(".parquet")}
    files = _litter(old - kept)
    going_on = any(receipt.name not in old for receipt in unnamed) or _assigns_unused(storage, entries, old, used)
    if not going_on:
        files |= _unneeded(receipts, unnamed, old)
    ordered = dict(sorted(files.items(), key=lambda file: file[0].endswith(".tar")))
    sizes = {name: entries[name].size for name in ordered}
    return Garbage(ordered, sizes, len(unnamed) if going_on else 0, foreign)


def remove_garbage(storage: Storage, garbage: Garbage, track: Track = iter) -> None:
    """Delete the files; a kill in between leaves litter and no receipt without its tar."""
    for name in track([*garbage.files]):
        storage.remove(name)


def _is_used(receipt: Receipt, used: Keys) -> bool:
    names = used.get("/".join(receipt.folder.split("/")[:2]), set())
    return any(place.key in names for place in receipt.samples) or not names.isdisjoint(receipt.skipped)


def _litter(names: set[str]) -> dict[str, str]:
    """Return name -> reason of the files among `names` that no reader looks at."""
    reasons = {}
    for name in sorted(names):
        if is_temporary(name):
            reasons[name] = "temporary files"
        elif name.endswith(".damaged"):
            reasons[name] = "damaged files"
        elif name.endswith((".tar", ".parquet")):
            reasons[name] = "tars and tables without a name"
    return reasons


def _assigns_unused(storage: Storage, entries: Mapping[str, Entry], old: set[str], used: Keys) -> bool:
    """Return whether a young assignment holds a key that no view names."""
    for name in entries.keys() - old:
        if name.startswith("assignments/") and name.endswith(".json") and not is_temporary(name):
            for shard in read_assignment(storage, name):
                names = used.get("/".join(shard["folder"].split("/")[:2]), set())
                if any(key not in names for batch in shard["batches"] for key in batch):
                    return True
    return False


def _unneeded(receipts: list[Receipt], unnamed: list[Receipt], old: set[str]) -> dict[str, str]:
    """Return name -> reason of shards that no view names, collections without a shard, and assignments."""
    reasons = {}
    unneeded = {receipt.name for receipt in unnamed}
    tars = {receipt.tar for receipt in receipts if receipt.name not in unneeded}  # shards without a sample share theirs
    for receipt in unnamed:
        reasons[receipt.name] = "shards that no view names"
        if receipt.tar not in tars:
            reasons[receipt.tar] = "shards that no view names"
    needed = {receipt.folder.split("/")[1] for receipt in receipts if receipt.name not in reasons}
    for name in old:
        parts = name.split("/")
        if name.startswith("made_by/") or name.endswith(("/recipe.json", f"/{INDEX}")):
            if parts[1] not in needed:
                reasons[name] = "collections without a shard"
        elif name.startswith("assignments/") and name.endswith(".json"):
            reasons[name] = "assignments of finished runs"
    return reasons

"""Every byte of a cache compared with what vouches for it: `precog cache verify`."""

import json
from collections.abc import Callable, Iterator
from functools import partial

from shared.cache.collection import KINDS, PLAN_BYTES, Collection, read_recipe
from shared.cache.shard import MappedShard, read_receipt
from shared.cache.storage import Storage
from shared.cache.view import read_view, view_names
from shared.errors import CacheError
from shared.fingerprint import is_key


def verify(storage: Storage, *, repair: bool) -> tuple[int, list[str]]:
    """Check shards, recipes, plans and views: (shards checked, one line per damaged file).

    With `repair`, a damaged file is renamed to `*.damaged`, together with what is nothing without it; precompute makes
    them again.
    """
    checked, damaged = 0, []
    for check, files in _checks(storage):
        checked += files[-1].endswith(".tar")
        try:
            check()
        except CacheError as error:
            damaged.append(str(error))
            if repair:
                for name in files:
                    storage.set_aside(name)
    return checked, damaged


def _checks(storage: Storage) -> Iterator[tuple[Callable[[], object], tuple[str, ...]]]:
    """What raises `CacheError`, and the names of the files that it is about."""
    for name in [name for kind in KINDS for name in storage.names(kind, ".json")]:
        if name.endswith("/recipe.json"):
            yield partial(read_recipe, storage, Collection(*name.split("/")[:2])), (name,)
        else:
            yield partial(check_shard, storage, name), (name, name.removesuffix(".json") + ".tar")
    for name in storage.names("plans", ".json"):
        yield partial(check_plan, storage, name), (name,)
    for name in view_names(storage):
        yield partial(read_view, storage, name), (f"datasets/{name}.json", f"datasets/{name}.parquet")


def check_shard(storage: Storage, receipt_name: str) -> None:
    """Compare all bytes of a shard with its receipt; raises `CacheError` naming what is damaged."""
    tar = receipt_name.removesuffix(".json") + ".tar"
    receipt = read_receipt(storage, receipt_name)
    mapped = MappedShard(storage, tar, receipt)
    for place in receipt.samples:
        if mapped.payload_sha256(place) != place.sha256:
            raise CacheError(f"{storage}/{tar}: sample {place.key} is damaged")
    if mapped.sha256() != receipt.sha256:
        raise CacheError(f"{storage}/{tar}: the bytes between samples are damaged")


def check_plan(storage: Storage, name: str) -> None:
    """Raises `CacheError` if a plan is no list of shards of keys; that they are the wanted ones, its reader checks."""
    try:
        for shard in json.loads(storage.read(name, limit_bytes=PLAN_BYTES)):
            keys = [key for batch in shard["batches"] for key in batch]
            if not keys or not all(map(is_key, keys)) or shard["folder"].partition("/")[0] not in KINDS:
                raise ValueError("not a list of shards")
            int(shard["attempt"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CacheError(f"{storage}/{name}: damaged plan ({error})") from None

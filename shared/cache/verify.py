"""Compare every byte of a cache with its hash: `precog cache verify`."""

from contextlib import suppress

from shared.cache.collection import KINDS, Collection, read_recipe
from shared.cache.shard import MappedShard, read_receipt
from shared.cache.storage import VERIFY, Storage
from shared.cache.view import read_view
from shared.errors import CacheError, Preempted, one_line
from shared.fingerprint import unsealed

ASSIGNMENT_BYTES = 256 * 2**20


def verify(storage: Storage, *, repair: bool) -> tuple[int, list[str]]:
    """Check shards, recipes, assignments and views; return (shards checked, one line per damaged file).

    A damaged file never ends the check, whatever it raises. With `repair`, it is renamed to `*.damaged`, together with
    its second file; precompute makes both again.
    """
    checked, damaged = 0, []
    files = [name for folder in (*KINDS, "assignments", "datasets") for name in storage.files(folder)]
    for name in [name for name in files if name.endswith(".json")]:
        checked += name.startswith(KINDS) and not name.endswith("/recipe.json")
        try:
            _check(storage, name)
        except Preempted:
            raise
        except Exception as error:
            line = str(error) if isinstance(error, CacheError) else f"{storage}/{name}: {one_line(error)}"
            damaged.append(line.partition(f"; {VERIFY}")[0])
            if repair:
                _set_aside(storage, name)
    return checked, damaged


def _check(storage: Storage, name: str) -> None:
    """Raise an exception if the file `name`, or the tar or table that belongs to it, is damaged."""
    if name.startswith("datasets/"):
        read_view(storage, name.removeprefix("datasets/").removesuffix(".json"))
    elif name.startswith("assignments/"):
        read_assignment(storage, name)
    elif name.endswith("/recipe.json"):
        read_recipe(storage, Collection(*name.split("/")[:2]))
    else:
        check_shard(storage, name)


def _set_aside(storage: Storage, name: str) -> None:
    """Rename a damaged file, and the tar of a receipt or the table of a view."""
    names = [name]
    if name.startswith("datasets/"):
        names.append(name.removesuffix(".json") + ".parquet")
    elif name.startswith(KINDS):
        with suppress(CacheError):  # a damaged receipt names no tar; precompute writes it again
            names.append(read_receipt(storage, name).tar)
    for each in names:
        storage.set_aside(each)


def check_shard(storage: Storage, receipt_name: str) -> None:
    """Compare all bytes of a shard with its receipt; raises `CacheError` naming the damaged file."""
    receipt = read_receipt(storage, receipt_name)
    mapped = MappedShard(storage, receipt.tar, receipt)
    for place in receipt.samples:
        if mapped.payload_sha256(place) != place.sha256:
            raise CacheError(f"{storage}/{receipt.tar}: sample {place.key} is damaged; {VERIFY}")
    if mapped.sha256() != receipt.sha256:
        raise CacheError(f"{storage}/{receipt.tar}: the bytes between samples are damaged; {VERIFY}")


def read_assignment(storage: Storage, name: str) -> object:
    """Read the shards of an assignment file; raises `CacheError` if it is damaged or another file's."""
    try:
        body = unsealed(storage.read(name, limit_bytes=ASSIGNMENT_BYTES))
        if body["name"] != name:
            raise ValueError(f"the assignment {body['name']}")
        return body["shards"]
    except (ValueError, KeyError) as error:
        raise CacheError(f"{storage}/{name}: damaged ({error}); {VERIFY}") from None

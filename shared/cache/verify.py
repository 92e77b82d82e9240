"""Compare every byte of a cache with its hash: `precog cache verify`."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from shared.cache.collection import KINDS, VIEW_BYTES, Collection, read_recipe, without_foreign
from shared.cache.index import receipt_names
from shared.cache.remote import is_temporary
from shared.cache.shard import OpenShard, read_receipt
from shared.cache.storage import VERIFY, Storage
from shared.cache.view import read_table_name, read_view, table_name
from shared.errors import CacheError, one_line
from shared.fingerprint import key_of, unsealed

ASSIGNMENT_BYTES = 256 * 2**20
MADE_BY_BYTES = 2**20
FOLDERS = (*KINDS, "made_by", "assignments", "datasets")
"""Folders of a cache; nothing outside them is looked at."""

Track = Callable[[Sequence[str]], Iterable[str]]
"""Yields the names that it is given; a command shows its progress with one."""


def verify(storage: Storage, *, repair: bool, track: Track = iter) -> tuple[int, list[str]]:
    """Check shards, recipes, assignments and views; return (shards checked, one line per damaged file).

    A damaged file never ends the check, whatever it raises. With `repair`, it is renamed to `*.damaged`, together with
    its second file; precompute makes both again. Collections of other formats are left alone.
    """
    files, damaged = list[str](), list[str]()
    for folder in FOLDERS:
        try:
            files += [name for name in storage.entries(folder) if not is_temporary(name)]
        except CacheError as error:
            damaged.append(str(error))
    own, _ = without_foreign(storage, files)
    names = [name for name in own if name.endswith(".json")]
    parts = [name.split("/") for name in names if name.startswith(KINDS)]
    names = sorted({*names, *("/".join([*part[:2], "recipe.json"]) for part in parts if len(part) > 2)})  # also missing
    for name in track(names):
        try:
            _check(storage, name)
        except Exception as error:
            line = str(error) if isinstance(error, CacheError) else f"{storage}/{name}: {one_line(error)}"
            damaged.append(line.partition(f"; {VERIFY}")[0])
            damaged += _set_aside(storage, name) if repair else []
    return sum(name.startswith(KINDS) for name in receipt_names(names)), damaged


def _check(storage: Storage, name: str) -> None:
    """Raise an exception if the file `name`, or the tar or table that belongs to it, is damaged."""
    if name.startswith("datasets/"):
        read_view(storage, name.removeprefix("datasets/").removesuffix(".json"))
    elif name.startswith("assignments/"):
        read_assignment(storage, name)
    elif name.startswith("made_by/"):
        if key_of(json.loads(storage.read(name, limit_bytes=MADE_BY_BYTES))) != name.rpartition("/")[2][:-5]:
            raise CacheError(f"{storage}/{name}: damaged (its hash is not its name)")
    elif name.endswith("/recipe.json"):
        read_recipe(storage, Collection(*name.split("/")[:2]))
    else:
        check_shard(storage, name)


def _set_aside(storage: Storage, name: str) -> list[str]:
    """Rename a damaged file, and the tar of a receipt or the table of a view; return a line for each that stays."""
    names, problems = [name], []
    with suppress(CacheError):  # a damaged receipt or view names no second file
        if name.startswith("datasets/"):
            table = read_table_name(storage, name)
            content = storage.read(table, limit_bytes=VIEW_BYTES)
            if table != table_name(hashlib.sha256(content).hexdigest()):  # else it may be another view's too
                names.append(table)
        elif name.startswith(KINDS) and not name.endswith("/recipe.json"):
            names.append(read_receipt(storage, name).tar)
    for each in names:
        try:
            storage.set_aside(each)
        except CacheError as error:
            problems.append(str(error))
    return problems


def check_shard(storage: Storage, receipt_name: str) -> None:
    """Compare all bytes of a shard with its receipt; raises `CacheError` naming the damaged file."""
    receipt = read_receipt(storage, receipt_name)
    shard = OpenShard(storage, receipt)
    if shard.sha256() != receipt.sha256:
        for place in receipt.samples:
            shard.read(place)  # raises for the damaged one
        raise CacheError(f"{storage}/{receipt.tar}: the bytes between samples are damaged; {VERIFY}")


def read_assignment(storage: Storage, name: str) -> Any:
    """Read the shards of an assignment file; raises `CacheError` if it is damaged or another file's."""
    try:
        body = unsealed(storage.read(name, limit_bytes=ASSIGNMENT_BYTES))
        if body["name"] != name:
            raise ValueError(f"the assignment {body['name']}")
        return body["shards"]
    except (ValueError, KeyError) as error:
        raise CacheError(f"{storage}/{name}: damaged ({error}); {VERIFY}") from None

"""The samples of a collection as columns, found by its receipts; `index.bin` keeps the columns for the next reader.

The index saves parsing, not reading: its rows count only for receipts of the very bytes that they were taken from. A
damaged, outdated or missing index costs time and nothing else.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from shared.cache.shard import RECEIPT_BYTES, Receipt, SamplePlace, TensorPlace, checked_receipt
from shared.cache.storage import VERIFY, Storage
from shared.errors import CacheError
from shared.fingerprint import canonical_json

INDEX = "index.bin"
INDEX_BYTES = 2**30
READERS = 16
"""Receipts read at the same time; an object store answers each after tens of milliseconds."""
ROW = np.dtype(
    [("key", "S32"), ("xxh128", "S32"), ("offset", "<i8"), ("length", "<i8"), ("shard", "<u4"), ("layout", "<u4")]
)
Layout = tuple[tuple[str, TensorPlace], ...]
"""Names and places of a sample's tensors, counted from its start; the samples of a bucket share one."""
HEAD = TypeAdapter(tuple[str, list[Receipt], list[str], list[Layout]])


@dataclass(frozen=True, slots=True)
class SampleTable:
    """The samples of a collection, ordered by key."""

    receipts: list[Receipt] = field(default_factory=list)
    """Those of its shards, without samples."""
    digests: list[str] = field(default_factory=list)
    """The sha256 of each receipt's bytes."""
    layouts: list[Layout] = field(default_factory=list)
    rows: npt.NDArray[np.void] = field(default_factory=lambda: np.empty(0, ROW))
    """[samples] of `ROW`; `shard` counts in `receipts`, `layout` in `layouts`."""
    num_parsed: int = 0
    """Receipts that were not in the index."""

    @property
    def keys(self) -> list[str]:
        """Return the keys, ascending."""
        return [key.decode() for key in self.rows["key"].tolist()]

    def find(self, keys: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return the row of each key, -1 for those that are not stored."""
        if not len(self.rows) or not len(keys):
            return np.full(len(keys), -1)
        stored, wanted = self.rows["key"], np.array(keys, np.bytes_)
        found = np.minimum(np.searchsorted(stored, wanted), len(stored) - 1)
        return np.where(stored[found] == wanted, found, -1)

    def place(self, key: str) -> tuple[Receipt, SamplePlace] | None:
        """Return a sample's receipt and place, None if it is not stored."""
        at = bisect_left(self.rows["key"], key.encode())
        if at == len(self.rows) or self.rows["key"][at] != key.encode():
            return None
        _, xxh128, offset, length, shard, layout = self.rows[at].item()
        tensors = {name: replace(tensor, offset=offset + tensor.offset) for name, tensor in self.layouts[layout]}
        return self.receipts[shard], SamplePlace(key, offset, length, xxh128.decode(), tensors)

    def as_bytes(self) -> bytes:
        """Return the content of an index: the hash of the rest, a line of JSON, and the rows."""
        layouts = [[(name, asdict(tensor)) for name, tensor in layout] for layout in self.layouts]
        head = canonical_json([str(ROW), [asdict(receipt) for receipt in self.receipts], self.digests, layouts])
        body = head + b"\n" + self.rows.tobytes()
        return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def receipt_names(files: Iterable[str]) -> list[str]:
    """Return the names of receipts among the files of collections."""
    return [name for name in files if name.endswith(".json") and not name.endswith("/recipe.json")]


def check_tars(storage: Storage, receipts: Iterable[Receipt], sizes: Mapping[str, int]) -> None:
    """Raise `CacheError` if a receipt's tar is missing or has another size; `sizes` is the listing."""
    for receipt in receipts:
        size = sizes.get(receipt.tar)
        if size != receipt.size and (size := storage.size(receipt.tar)) != receipt.size:  # the listing may be older
            found = "not found" if size is None else f"{size} bytes, expected {receipt.size}"
            raise CacheError(f"{storage}/{receipt.tar}: {found}; {VERIFY}")


def read_samples(storage: Storage, folder: str, known: frozenset[str] = frozenset()) -> SampleTable:
    """Return the samples below `folder`, of the shards whose receipts' names are not `known`.

    Lists the folder once and reads each receipt once, several at a time. A tar without a receipt does not exist.
    Raises `CacheError` if a receipt is damaged, or its tar is missing or has another size.
    """
    sizes = storage.files(folder)
    names = [name for name in receipt_names(sizes) if name not in known]
    index = SampleTable() if known or f"{folder}/{INDEX}" not in sizes else _read_index(storage, f"{folder}/{INDEX}")
    indexed = {digest: number for number, digest in enumerate(index.digests)}

    def read(name: str) -> tuple[str, Receipt | int]:
        """Return a receipt's digest, and the receipt or its number in the index."""
        content = storage.read(name, limit_bytes=RECEIPT_BYTES)
        digest = hashlib.sha256(content).hexdigest()
        number = indexed.get(digest)
        if number is None or index.receipts[number].name != name:
            return digest, checked_receipt(storage, name, content)
        return digest, number

    receipts, digests, parsed = list[Receipt](), list[str](), list[tuple[str | int, ...]]()
    layouts = {layout: number for number, layout in enumerate(index.layouts)}
    shards = np.full(len(index.receipts), len(names), np.uint32)  # number of each receipt of the index among `names`
    with ThreadPoolExecutor(READERS) as pool:
        for shard, (digest, found) in enumerate(pool.map(read, names)):
            if isinstance(found, int):
                shards[found] = shard
                receipt = index.receipts[found]
            else:
                receipt = replace(found, samples=())
                for place in found.samples:
                    layout = tuple(
                        (name, replace(at, offset=at.offset - place.offset)) for name, at in place.tensors.items()
                    )
                    number = layouts.setdefault(layout, len(layouts))
                    parsed.append((place.key, place.xxh128, place.offset, place.length, shard, number))
            receipts.append(receipt)
            digests.append(digest)
    check_tars(storage, receipts, sizes)
    kept = index.rows[shards[index.rows["shard"]] < len(names)]
    kept["shard"] = shards[kept["shard"]]
    rows = np.concatenate([kept, np.array(parsed, ROW)])
    rows = rows[np.argsort(rows["key"], kind="stable")]
    return SampleTable(receipts, digests, [*layouts], rows, int(len(names) - (shards < len(names)).sum()))


def write_index(storage: Storage, folder: str) -> None:
    """Write the index of a collection unless it holds all receipts already; raises `CacheError` as `read_samples`."""
    found = read_samples(storage, folder)
    if found.num_parsed:
        storage.publish(f"{folder}/{INDEX}", found.as_bytes(), replace=True)


def _read_index(storage: Storage, name: str) -> SampleTable:
    """Read an index; it is empty if a bit is off, or another version wrote it."""
    try:
        seal, _, body = storage.read(name, limit_bytes=INDEX_BYTES).partition(b"\n")
        head, _, content = body.partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != seal:
            raise ValueError("damaged")
        columns, receipts, digests, layouts = HEAD.validate_json(head)
        rows = np.frombuffer(content, ROW)
        sizes = np.array([one.size for one in receipts])
        ends = np.array([max(tensor.offset + tensor.num_bytes for _, tensor in layout) for layout in layouts])
        inside = (rows["offset"] >= 0) & (rows["offset"] + rows["length"] <= sizes[rows["shard"]])
        if columns != str(ROW) or not (inside & (ends[rows["layout"]] <= rows["length"])).all():
            raise ValueError("of another version, or places outside their shards")
        return SampleTable(receipts, digests, layouts, rows)
    except (CacheError, ValueError, IndexError, KeyError):
        return SampleTable()

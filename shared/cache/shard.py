"""One shard: a tar of safetensors and JSON that any webdataset reader streams, and a receipt to read it by offset.

Sample `key` is two members, `<key>.json` and `<key>.safetensors`. The tar is uncompressed ustar with sorted members and
no times or owners, so equal samples give equal bytes. The tar is named by the sha256 of its bytes, the receipt by the
keys that the shard was assigned. A sample is read by offset and compared with its hash at every read.
"""

import hashlib
import json
import math
import os
import struct
import tarfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import xxhash
from pydantic import Field, TypeAdapter
from safetensors.torch import save as safetensors_bytes

from shared.cache.storage import VERIFY, Storage
from shared.errors import CacheError, one_line
from shared.fingerprint import KEY_LENGTH, Json, canonical_json, key_of, sealed, sha256_file, unsealed
from shared.regular_files import open_regular

RECEIPT_BYTES = 16 * 2**20
SHARD_BYTES = 4 * 2**30
HEADER_BYTES = 64 * 2**10
SAMPLES_PER_SHARD = 50_000
FACTS_BYTES = 64 * 2**10
"""Where a sample's facts are looked for, before its tensors."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
"""The safetensors dtypes that a sample may hold."""

Key = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{KEY_LENGTH}}}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """A tensor's bytes, counted from the start of the tar."""

    dtype: str
    shape: tuple[Annotated[int, Field(gt=0)], ...]
    offset: Annotated[int, Field(ge=0)]

    @property
    def num_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class SamplePlace:
    """A sample's safetensors member, counted from the start of the tar."""

    key: Key
    offset: Annotated[int, Field(ge=0)]
    length: Annotated[int, Field(gt=0)]
    xxh128: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    """XXH3 of the member's bytes: as fast as memory, so that every read is checked; the tar has a SHA-256."""
    tensors: dict[str, TensorPlace]


@dataclass(frozen=True, slots=True)
class Receipt:
    """The contents of a shard. It is written last: the shard exists when its receipt does."""

    folder: str
    """Of the shard, relative to the cache."""
    shard: Key
    sha256: Sha256
    """Of the tar, which names it."""
    size: Annotated[int, Field(gt=0, le=SHARD_BYTES)]
    """Of the tar, in bytes."""
    samples: Annotated[tuple[SamplePlace, ...], Field(max_length=SAMPLES_PER_SHARD)]
    skipped: dict[Key, str]
    """Key -> reason, for the clips of this shard that could not be encoded."""
    attempt: int
    """How often the clips of this shard had been skipped before."""
    tar: str = field(init=False)
    """Name of the tar, relative to the cache."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tar", f"{self.folder}/{self.sha256}.tar")

    @property
    def name(self) -> str:
        """The receipt's own name, relative to the cache."""
        return f"{self.folder}/{self.shard}.json"


RECEIPT = TypeAdapter(Receipt)


@dataclass(frozen=True, slots=True)
class Sample:
    """The content of one key before writing: tensors on the CPU, and facts in JSON."""

    key: str
    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Json]


def shard_name(keys: Iterable[str], attempt: int = 0) -> str:
    """Return the name of the shard with these keys; it is the same on every machine."""
    return key_of([*sorted(keys), attempt])


def _sample_place(key: str, payload: bytes, offset: int) -> SamplePlace:
    """Return the places of a sample and its tensors; its safetensors `payload` is at `offset`."""
    (header_length,) = struct.unpack("<Q", payload[:8])
    assert header_length <= HEADER_BYTES
    header = json.loads(payload[8 : 8 + header_length])
    start = offset + 8 + header_length
    tensors = {
        name: TensorPlace(entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
        for name, entry in sorted(header.items())
        if name != "__metadata__"
    }
    return SamplePlace(key, offset, len(payload), xxhash.xxh3_128_hexdigest(payload), tensors)


class ShardWriter:
    """A shard that is written sample by sample, in the order of their keys; memory holds one sample.

    Close an unfinished shard to give it up.
    """

    def __init__(self, storage: Storage, folder: str) -> None:
        from webdataset.writer import TarWriter

        self._storage, self._folder = storage, folder
        self._cleanup = ExitStack()
        self._name = f"{folder}/shard.tar"
        self._path = self._cleanup.enter_context(storage.unfinished(self._name))
        self._file = self._cleanup.enter_context(self._path.open("r+b"))
        self._tar = TarWriter(self._file, user="", group="", mode=0o644, encoder=False, mtime=0)
        self._places: list[SamplePlace] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Delete the temporary file."""
        with self._storage.writing(self._name), self._cleanup:
            self._tar.close()  # else its destructor writes to a closed file

    def add(self, sample: Sample) -> None:
        """Write a sample, whose key must follow that of the sample before; raises `CacheError` if the disk is full."""
        assert not self._places or self._places[-1].key < sample.key, sample.key
        payload = safetensors_bytes({name: tensor.contiguous() for name, tensor in sample.tensors.items()})
        with self._storage.writing(self._name):
            members = {"json": canonical_json(sample.facts), "safetensors": payload}
            self._tar.write({"__key__": sample.key, **members})
        offset = self._tar.tarstream.offset - math.ceil(len(payload) / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        self._places.append(_sample_place(sample.key, payload, offset))

    def finish(self, skipped: Mapping[str, str], attempt: int) -> tuple[Receipt, int]:
        """Publish the tar, then its receipt; return the valid receipt and the number of bytes stored.

        The first receipt wins. Two GPUs may round differently; then the second tar has no receipt and is garbage.
        Raises `CacheError` if the disk is full.
        """
        with self._storage.writing(self._name):
            self._tar.close()
            self._file.flush()
        name = shard_name([*(place.key for place in self._places), *skipped], attempt)
        size, places = self._path.stat().st_size, tuple(self._places)
        receipt = Receipt(self._folder, name, sha256_file(self._path), size, places, dict(skipped), attempt)
        if self._storage.size(receipt.name) is not None:
            return read_receipt(self._storage, receipt.name), 0
        written_bytes = receipt.size if publish_tar(self._storage, self._path, receipt) else 0
        body = receipt_bytes(receipt)
        if not self._storage.publish(receipt.name, body):
            return read_receipt(self._storage, receipt.name), written_bytes
        return receipt, written_bytes + len(body)


def publish_tar(storage: Storage, path: Path, receipt: Receipt) -> bool:
    """Give the file `path` the tar's name; return False if the whole tar is stored already."""
    if storage.publish_file(path, receipt.tar):
        return True
    try:
        same_size = storage.size(receipt.tar) == receipt.size
        whole = same_size and sha256_file(storage.local_tar(receipt.tar, receipt.size)) == receipt.sha256
    except (OSError, CacheError):
        whole = False
    # a crash left it torn, on a disk that ignores fsync
    return not whole and storage.publish_file(path, receipt.tar, replace=True)


def receipt_bytes(receipt: Receipt) -> bytes:
    """Return the receipt as JSON with its own hash."""
    return sealed(asdict(receipt))


def read_receipt(storage: Storage, name: str) -> Receipt:
    """Read a receipt; raises `CacheError` naming the file if it is missing, damaged or of another place."""
    return checked_receipt(storage, name, storage.read(name, limit_bytes=RECEIPT_BYTES))


def checked_receipt(storage: Storage, name: str, content: bytes) -> Receipt:
    """Return the receipt that the file `name` holds; raises `CacheError` as `read_receipt`."""
    receipt = parse_receipt(content, f"{storage}/{name}")
    if receipt.name != name:
        raise CacheError(f"{storage}/{name}: the receipt of {receipt.name}; {VERIFY}")
    return receipt


def parse_receipt(content: bytes, where: str) -> Receipt:
    """Read and check a receipt; raises `CacheError` naming the file `where` if a single bit is off."""
    try:
        receipt = RECEIPT.validate_python(unsealed(content))
        if receipt.shard != shard_name([*(place.key for place in receipt.samples), *receipt.skipped], receipt.attempt):
            raise ValueError("its name does not match its keys")
        for place in receipt.samples:
            _check_place(place, receipt.size)
    except ValueError as error:
        raise CacheError(f"{where}: damaged receipt ({one_line(error)}); {VERIFY}") from None
    return receipt


def _check_place(place: SamplePlace, size: int) -> None:
    """Raise `ValueError` if a sample leaves its tar of `size` bytes, or a tensor its sample."""
    if place.offset + place.length > size:
        raise ValueError(f"sample {place.key} lies outside the tar")
    for name, tensor in place.tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"tensor {name} of {place.key} has dtype {tensor.dtype}")
        if not place.offset <= tensor.offset <= tensor.offset + tensor.num_bytes <= place.offset + place.length:
            raise ValueError(f"tensor {name} of {place.key} lies outside its sample")


def sample_tensors(place: SamplePlace, content: bytearray, where: str) -> dict[str, torch.Tensor]:
    """Return the CPU tensors of a sample, views of `content`; raises `CacheError` if its hash is not the receipt's."""
    if xxhash.xxh3_128_hexdigest(content) != place.xxh128:
        raise CacheError(f"{where}: sample {place.key} is damaged; {VERIFY}")
    tensors = {}
    for name, tensor in place.tensors.items():
        flat = torch.frombuffer(
            content, dtype=DTYPES[tensor.dtype], count=math.prod(tensor.shape), offset=tensor.offset - place.offset
        )
        tensors[name] = flat.view(tensor.shape)
    return tensors


class OpenShard:
    """A tar open for reading by offset; unlike of a mapped one, its end may move without SIGBUS."""

    def __init__(self, storage: Storage, receipt: Receipt) -> None:
        self._where = f"{storage}/{receipt.tar}"
        try:
            self._file = open_regular(storage.local_tar(receipt.tar, receipt.size), through_links=True)
        except OSError as error:
            raise CacheError(f"{self._where}: cannot be opened ({error.strerror}); {VERIFY}") from None
        size = os.fstat(self._file.fileno()).st_size
        if size != receipt.size:
            self._file.close()
            raise CacheError(f"{self._where}: {size} bytes, expected {receipt.size}; {VERIFY}")

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def read(self, place: SamplePlace) -> dict[str, torch.Tensor]:
        """Return the tensors of one sample; raises `CacheError` if it is damaged."""
        content = bytearray(place.length)
        unread, offset = memoryview(content), place.offset
        try:
            while unread and (count := os.preadv(self._file.fileno(), [unread], offset)):
                unread, offset = unread[count:], offset + count
        except OSError as error:
            raise CacheError(f"{self._where}: cannot be read ({error.strerror}); {VERIFY}") from None
        return sample_tensors(place, content, self._where)

    def sha256(self) -> str:
        """Return the hash of the whole tar."""
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()


def read_facts(storage: Storage, tar: str, place: SamplePlace) -> dict[str, Any]:
    """Return a sample's facts, the JSON member before its tensors; raises `CacheError`."""
    start = max(0, place.offset - FACTS_BYTES)
    content = storage.read_part(tar, start, place.offset - start)
    at = content.rfind(f"{place.key}.json\0".encode())
    try:
        member = tarfile.TarInfo.frombuf(content[at : at + tarfile.BLOCKSIZE], "utf-8", "strict")
        facts: dict[str, Any] = json.loads(content[at + tarfile.BLOCKSIZE :][: member.size])
    except (ValueError, RecursionError, tarfile.TarError) as error:
        raise CacheError(f"{storage}/{tar}: facts of {place.key} are damaged ({one_line(error)}); {VERIFY}") from None
    return facts

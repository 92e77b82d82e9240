"""One shard: a tar of safetensors and JSON that any webdataset reader streams, and a receipt to read it by offset.

Sample `key` is two members, `<key>.json` and `<key>.safetensors`. The tar is uncompressed ustar with sorted members and
no times or owners, so equal samples give equal bytes. The tar is named by the sha256 of its bytes, the receipt by the
keys that the shard was assigned. Payloads start on 512-byte blocks and safetensors pads its header to 8 bytes, so a
tensor is a zero-copy view of the mapped file.
"""

import hashlib
import io
import json
import math
import mmap
import struct
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter
from safetensors.torch import save as safetensors_bytes

from shared.cache.storage import VERIFY, Storage, open_file
from shared.errors import CacheError, one_line
from shared.fingerprint import KEY_LENGTH, Json, canonical_json, key_of, sealed, unsealed

RECEIPT_BYTES = 16 * 2**20
SHARD_BYTES = 4 * 2**30
HEADER_BYTES = 64 * 2**10
SAMPLES_PER_SHARD = 50_000

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The safetensors dtypes that a sample may hold."""

Key = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{KEY_LENGTH}}}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """A tensor's bytes, counted from the start of the tar."""

    dtype: str
    shape: tuple[Annotated[int, Field(gt=0)], ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class SamplePlace:
    """A sample's safetensors member, counted from the start of the tar."""

    key: Key
    offset: Annotated[int, Field(ge=0)]
    length: Annotated[int, Field(gt=0)]
    sha256: Sha256
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


def pack_shard(
    folder: str, samples: Sequence[Sample], skipped: Mapping[str, str] | None = None, attempt: int = 0
) -> tuple[bytes, Receipt]:
    """Return the tar's bytes and its receipt."""
    from webdataset.writer import TarWriter

    skipped = dict(skipped or {})
    payloads: dict[str, bytes] = {}
    stream = io.BytesIO()
    with TarWriter(stream, user="", group="", mode=0o644, encoder=False, mtime=0) as writer:
        for sample in sorted(samples, key=lambda sample: sample.key):
            assert sample.key not in payloads, sample.key
            tensors = {name: tensor.contiguous() for name, tensor in sample.tensors.items()}
            payloads[sample.key] = safetensors_bytes(tensors)
            members = {"json": canonical_json(sample.facts), "safetensors": payloads[sample.key]}
            writer.write({"__key__": sample.key, **members})
    content = stream.getvalue()
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        offsets = {member.name: member.offset_data for member in tar}
    places = tuple(_sample_place(key, payload, offsets[f"{key}.safetensors"]) for key, payload in payloads.items())
    name = shard_name([*payloads, *skipped], attempt)
    digest = hashlib.sha256(content).hexdigest()
    return content, Receipt(folder, name, digest, len(content), places, skipped, attempt)


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
    return SamplePlace(key, offset, len(payload), hashlib.sha256(payload).hexdigest(), tensors)


def write_shard(
    storage: Storage,
    folder: str,
    samples: Sequence[Sample],
    skipped: Mapping[str, str] | None = None,
    attempt: int = 0,
) -> tuple[Receipt, int]:
    """Write the tar, then its receipt; return the valid receipt and how many bytes this call wrote.

    The first receipt wins. Two GPUs may round differently; then the second tar has no receipt and is garbage.
    Raises `CacheError` if the disk is full.
    """
    content, receipt = pack_shard(folder, samples, skipped, attempt)
    if storage.size(receipt.name) is not None:
        return read_receipt(storage, receipt.name), 0
    written_bytes = len(content)
    if not storage.publish(receipt.tar, content):
        whole = storage.size(receipt.tar) == len(content)
        if whole and storage.read(receipt.tar, limit_bytes=len(content)) == content:
            written_bytes = 0
        else:  # a crash left it torn, on a disk that ignores fsync
            storage.publish(receipt.tar, content, replace=True)
    body = receipt_bytes(receipt)
    if not storage.publish(receipt.name, body):
        return read_receipt(storage, receipt.name), written_bytes
    return receipt, written_bytes + len(body)


def receipt_bytes(receipt: Receipt) -> bytes:
    """Return the receipt as JSON with its own hash."""
    return sealed(asdict(receipt))


def read_receipt(storage: Storage, name: str) -> Receipt:
    """Read a receipt; raises `CacheError` naming the file if it is missing, damaged or of another place."""
    receipt = parse_receipt(storage.read(name, limit_bytes=RECEIPT_BYTES), f"{storage}/{name}")
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


def sample_tensors(place: SamplePlace, content: mmap.mmap | bytearray, start: int) -> dict[str, torch.Tensor]:
    """Return zero-copy CPU tensors of one sample; `content` is the tar from byte `start` on."""
    return {
        name: torch.frombuffer(
            content, dtype=DTYPES[tensor.dtype], count=math.prod(tensor.shape), offset=tensor.offset - start
        ).view(tensor.shape)
        for name, tensor in place.tensors.items()
    }


class MappedShard:
    """A tar mapped into memory; its samples are views of the page cache."""

    def __init__(self, storage: Storage, tar_name: str, receipt: Receipt) -> None:
        where = f"{storage}/{tar_name}"
        try:
            with open_file(storage.path(tar_name)) as file:
                self._map = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CacheError(f"{where}: cannot be opened ({reason}); {VERIFY}") from None
        if len(self._map) != receipt.size:
            raise CacheError(f"{where}: {len(self._map)} bytes, expected {receipt.size}; {VERIFY}")

    def tensors(self, place: SamplePlace) -> dict[str, torch.Tensor]:
        """Return zero-copy CPU tensors of one sample; writing to one changes private memory only."""
        return sample_tensors(place, self._map, 0)

    def payload_sha256(self, place: SamplePlace) -> str:
        """Return the hash of a sample's present bytes, to compare with the receipt's."""
        return hashlib.sha256(memoryview(self._map)[place.offset : place.offset + place.length]).hexdigest()

    def sha256(self) -> str:
        """Return the hash of the whole tar."""
        return hashlib.sha256(self._map).hexdigest()

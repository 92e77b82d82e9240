"""One shard: a plain tar of safetensors + JSON that any webdataset reader streams, and a receipt to read it by offset.

Sample `key` is two members, `<key>.json` and `<key>.safetensors`. The tar is uncompressed ustar with sorted members and
no times or owners, so equal samples give equal bytes. Payloads start on 512-byte blocks and safetensors pads its header
to 8 bytes, so a tensor is a zero-copy view of the mapped file.
"""

import hashlib
import io
import json
import mmap
import struct
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as safetensors_bytes

from shared.cache.storage import Storage
from shared.errors import CacheError
from shared.fingerprint import Json, canonical_json, is_key, key_of

RECEIPT_BYTES = 16 * 2**20
SHARD_BYTES = 4 * 2**30
HEADER_BYTES = 64 * 2**10
SAMPLES_PER_SHARD = 50_000
ROUNDING = 0.25
"""Of a tensor's root mean square: far above what GPUs round apart, below what a lost page or exponent bit does."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The safetensors dtypes a sample may hold."""


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """A tensor's bytes, counted from the start of the tar."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class SamplePlace:
    """A sample's safetensors member, counted from the start of the tar."""

    key: str
    offset: int
    length: int
    sha256: str
    tensors: dict[str, TensorPlace]


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a shard holds. It is written last: the shard exists when its receipt does."""

    shard: str
    sha256: str
    size: int
    samples: tuple[SamplePlace, ...]
    skipped: dict[str, str]
    """Key -> reason, for the clips of this shard that could not be encoded."""
    attempt: int
    """How often clips of this shard had been skipped before."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What one key holds, before writing: tensors on the CPU and the facts that explain them."""

    key: str
    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Json]


def shard_name(keys: Iterable[str], attempt: int = 0) -> str:
    """A shard is named by the keys it was planned for, so any machine gives the same work the same name."""
    return key_of([*sorted(keys), attempt])


def pack_shard(
    samples: Sequence[Sample], skipped: Mapping[str, str] | None = None, attempt: int = 0
) -> tuple[bytes, Receipt]:
    """The tar's bytes and its receipt."""
    skipped = dict(skipped or {})
    assert len({sample.key for sample in samples}) == len(samples), "a key comes twice"
    stream = io.BytesIO()
    places = []
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in sorted(samples, key=lambda sample: sample.key):
            assert is_key(sample.key), sample.key
            _add(tar, f"{sample.key}.json", canonical_json(sample.facts))
            payload = safetensors_bytes({name: tensor.contiguous() for name, tensor in sample.tensors.items()})
            _add(tar, f"{sample.key}.safetensors", payload)
            offset = stream.tell() - -(-len(payload) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            digest = hashlib.sha256(payload).hexdigest()
            places.append(SamplePlace(sample.key, offset, len(payload), digest, _tensor_places(payload, offset)))
    content = stream.getvalue()
    name = shard_name([*(sample.key for sample in samples), *skipped], attempt)
    return content, Receipt(name, hashlib.sha256(content).hexdigest(), len(content), tuple(places), skipped, attempt)


def _add(tar: tarfile.TarFile, name: str, payload: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(payload)
    info.mode = 0o644
    tar.addfile(info, io.BytesIO(payload))


def _tensor_places(payload: bytes, offset: int) -> dict[str, TensorPlace]:
    """Where the tensors of a safetensors blob that we made ourselves lie."""
    (header_length,) = struct.unpack("<Q", payload[:8])
    assert header_length <= HEADER_BYTES
    header = json.loads(payload[8 : 8 + header_length])
    start = offset + 8 + header_length
    return {
        name: TensorPlace(entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
        for name, entry in sorted(header.items())
        if name != "__metadata__"
    }


def write_shard(
    storage: Storage,
    folder: str,
    samples: Sequence[Sample],
    skipped: Mapping[str, str] | None = None,
    attempt: int = 0,
) -> tuple[Receipt, int]:
    """Publish the tar, then its receipt; the receipt that is there then, and how many bytes this call wrote.

    The first writer wins. Whoever finds a whole tar without a receipt (a crash left it, or another writer is about to
    finish it) writes the receipt of that tar, not of its own bytes: two GPUs may round differently, and receipt and
    tar must belong together whoever comes when. A tar that differs from the samples by more than rounding has been
    damaged while nothing vouched for it, and is replaced. Raises `CacheError` if the disk is full.
    """
    content, receipt = pack_shard(samples, skipped, attempt)
    tar_name, receipt_name = f"{folder}/{receipt.shard}.tar", f"{folder}/{receipt.shard}.json"
    written_bytes = len(content)
    if not storage.publish(tar_name, content):
        if storage.exists(receipt_name):
            return read_receipt(storage, receipt_name), 0
        theirs = _receipt_of(storage.read(tar_name, limit_bytes=SHARD_BYTES), samples, receipt)
        if theirs is None:
            storage.publish(tar_name, content, replace=True)
        else:
            receipt, written_bytes = theirs, 0
    vouching = receipt_bytes(receipt)
    if not storage.publish(receipt_name, vouching):
        return read_receipt(storage, receipt_name), written_bytes
    return receipt, written_bytes + len(vouching)


def _receipt_of(content: bytes, ours: Sequence[Sample], wanted: Receipt) -> Receipt | None:
    """The receipt of a tar made for the same keys, or None if it is damaged.

    Packing what a whole one holds gives it again, and it holds what is `ours` up to rounding.
    """
    keys = {*(place.key for place in wanted.samples), *wanted.skipped}
    try:
        samples = _unpack(content)
    except (tarfile.TarError, SafetensorError, ValueError, KeyError, RecursionError):
        return None
    missing = keys - {sample.key for sample in samples}
    if len(samples) + len(missing) != len(keys):
        return None
    if missing - wanted.skipped.keys() and len(content) == wanted.size:
        return None  # a tar without them is shorter: they are lost zeros, not skipped
    known = {sample.key: sample for sample in ours}
    if not all(_alike(sample, known[sample.key]) for sample in samples if sample.key in known):
        return None
    skipped = {key: wanted.skipped.get(key, "skipped by another worker") for key in missing}
    again, receipt = pack_shard(samples, skipped, wanted.attempt)
    return receipt if again == content else None


def _alike(one: Sample, other: Sample) -> bool:
    """Whether two machines may have encoded the same: no value is off by more than a part of the tensor's size."""
    if [(name, value.dtype, value.shape) for name, value in sorted(one.tensors.items())] != [
        (name, value.dtype, value.shape) for name, value in sorted(other.tensors.items())
    ]:
        return False
    for name, value in one.tensors.items():
        expected = other.tensors[name].double()
        size = expected.square().mean().sqrt()
        if not (value.double() - expected).abs().max() <= ROUNDING * size:  # also false for NaN
            return False
    return True


def _unpack(content: bytes) -> list[Sample]:
    """The samples of a tar that nobody has vouched for; whatever is wrong with it raises."""
    files = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            stream = tar.extractfile(member)
            if stream is None or member.name in files:
                raise ValueError(f"unexpected member {member.name!r}")
            files[member.name] = stream.read()
    keys = sorted({name.partition(".")[0] for name in files})
    if not all(is_key(key) for key in keys):
        raise ValueError("a member is not named by a key")
    return [
        Sample(key, load_safetensors(files[f"{key}.safetensors"]), json.loads(files[f"{key}.json"])) for key in keys
    ]


def read_receipt(storage: Storage, name: str) -> Receipt:
    """Raises `CacheError` naming the file if it is missing or damaged."""
    return parse_receipt(storage.read(name, limit_bytes=RECEIPT_BYTES), f"{storage}/{name}")


def receipt_bytes(receipt: Receipt) -> bytes:
    """JSON that ends with a hash of itself."""
    body: dict[str, Any] = asdict(receipt)
    return json.dumps({**body, "receipt_sha256": _receipt_hash(body)}, sort_keys=True, indent=1).encode()


def _receipt_hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(body)).hexdigest()


def parse_receipt(content: bytes, where: str) -> Receipt:
    """Check and read a receipt; raises `CacheError` naming the file if a single bit is off."""
    try:
        body = json.loads(content)
        claimed = body.pop("receipt_sha256")
        if claimed != _receipt_hash(body):
            raise ValueError("its own hash does not match")
        places = tuple(_sample_place(entry) for entry in body["samples"])
        receipt = Receipt(body["shard"], body["sha256"], body["size"], places, dict(body["skipped"]), body["attempt"])
        if receipt.shard != shard_name([*(place.key for place in places), *receipt.skipped], receipt.attempt):
            raise ValueError("its name does not match its keys")
        if not 0 < receipt.size <= SHARD_BYTES or len(places) > SAMPLES_PER_SHARD:
            raise ValueError("impossible size")
        for place in places:
            _check_place(place, receipt.size)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CacheError(f"{where}: damaged receipt ({error}); `precog cache verify --repair` sets it aside") from None
    return receipt


def _sample_place(entry: Mapping[str, Any]) -> SamplePlace:
    tensors = {
        name: TensorPlace(place["dtype"], tuple(place["shape"]), place["offset"])
        for name, place in entry["tensors"].items()
    }
    return SamplePlace(entry["key"], entry["offset"], entry["length"], entry["sha256"], tensors)


def _check_place(place: SamplePlace, size: int) -> None:
    if not is_key(place.key):
        raise ValueError(f"bad key {place.key!r}")
    if not 0 <= place.offset < place.offset + place.length <= size:
        raise ValueError(f"sample {place.key} lies outside the tar")
    for name, tensor in place.tensors.items():
        num_bytes = DTYPES[tensor.dtype].itemsize * _product(tensor.shape)
        if not place.offset <= tensor.offset <= tensor.offset + num_bytes <= place.offset + place.length:
            raise ValueError(f"tensor {name} of {place.key} lies outside its sample")


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        if side <= 0:
            raise ValueError(f"bad shape {shape}")
        total *= side
    return total


def sample_tensors(place: SamplePlace, content: mmap.mmap | bytearray, start: int) -> dict[str, torch.Tensor]:
    """Zero-copy CPU tensors of one sample; `content` is of the tar from byte `start` on."""
    return {
        name: torch.frombuffer(
            content, dtype=DTYPES[tensor.dtype], count=_product(tensor.shape), offset=tensor.offset - start
        ).view(tensor.shape)
        for name, tensor in place.tensors.items()
    }


class MappedShard:
    """A tar mapped into memory; its samples are views of the page cache."""

    def __init__(self, storage: Storage, tar_name: str, receipt: Receipt) -> None:
        self.where = where = f"{storage}/{tar_name}"
        try:
            with storage.path(tar_name).open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CacheError(
                f"{where}: cannot be opened ({reason}); `precog cache verify --repair` sets it aside"
            ) from None
        if len(self._map) != receipt.size:
            raise CacheError(f"{where}: {len(self._map)} bytes where its receipt says {receipt.size}")

    def tensors(self, place: SamplePlace) -> dict[str, torch.Tensor]:
        """Zero-copy CPU tensors of one sample; writing to one changes private memory only."""
        return sample_tensors(place, self._map, 0)

    def payload_sha256(self, place: SamplePlace) -> str:
        """Hash of the bytes that are there now, to compare with the receipt's."""
        return hashlib.sha256(memoryview(self._map)[place.offset : place.offset + place.length]).hexdigest()

    def sha256(self) -> str:
        return hashlib.sha256(self._map).hexdigest()

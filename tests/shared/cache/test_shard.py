"""One shard: its bytes, webdataset's and our reading of it, and the receipts that are refused."""

import gc
import hashlib
import io
import json
import os
import random
import resource
import tarfile
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
import webdataset
from safetensors.torch import load as load_safetensors

from bench.shards import write_shard
from shared.cache.shard import (
    OpenShard,
    Sample,
    ShardWriter,
    parse_receipt,
    read_receipt,
    receipt_bytes,
    shard_name,
)
from shared.cache.storage import LocalStorage
from shared.errors import CacheError
from shared.fingerprint import key_of, sealed, unsealed
from tests.faults.writer import ended, in_child
from tests.shared.cache.samples import FOLDER, make_samples, pack_shard

RECEIPT = receipt_bytes(pack_shard(FOLDER, make_samples(2), {key_of("bad"): "broken"})[1])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its file open
def test_plain_webdataset_streams_what_our_reader_reads(storage: LocalStorage) -> None:
    samples = {sample.key: sample for sample in make_samples()}
    receipt, _ = write_shard(storage, FOLDER, list(samples.values()))
    opened = OpenShard(storage, receipt)
    streamed = list(webdataset.WebDataset(str(storage.path(receipt.tar)), shardshuffle=False))
    assert [item["__key__"] for item in streamed] == sorted(samples)
    for item, place in zip(streamed, receipt.samples, strict=True):
        sample = samples[item["__key__"]]
        theirs, ours = load_safetensors(item["safetensors"]), opened.read(place)
        assert theirs.keys() == ours.keys() == sample.tensors.keys()
        for name, tensor in sample.tensors.items():
            assert torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype
            assert torch.equal(theirs[name], tensor)
        assert json.loads(item["json"]) == sample.facts
    gc.collect()


def test_a_shard_that_is_given_up_says_nothing(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The destructor of the tar writes what it has in its buffer, after the file was closed."""
    said: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", said.append)
    with ShardWriter(storage, FOLDER) as writer:
        writer.add(make_samples(1)[0])
    del writer
    gc.collect()
    assert said == []


def test_equal_samples_give_equal_bytes_in_any_order() -> None:
    samples = make_samples(5)
    content, receipt = pack_shard(FOLDER, samples, {key_of("bad"): "broken"}, 2)
    assert (content, receipt) == pack_shard(FOLDER, samples[::-1], {key_of("bad"): "broken"}, 2)
    assert receipt.tar == f"{FOLDER}/{hashlib.sha256(content).hexdigest()}.tar" and len(content) == receipt.size
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == sorted(member.name for member in members)
    assert all(member.offset_data % 512 == 0 for member in members)
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in members} == {
        (0, 0, 0, "", "", 0o644, tarfile.REGTYPE)
    }
    assert content[257:265] == b"ustar\x0000"


def test_bytes_and_names_of_a_known_shard_do_not_change() -> None:
    """Renew only with a new cache format: stored shards would not be found again."""
    sample = Sample("0" * 32, {"moments": torch.arange(24.0).view(2, 3, 1, 2, 2)}, {"a": 1})
    receipt = pack_shard(FOLDER, [sample])[1]
    assert receipt.name == f"{FOLDER}/d6b1039baf78122c83554e6cc9903c55.json"
    assert receipt.sha256.startswith("fe4e355da0baf0af")


def test_shard_cut_off_while_it_is_open_is_an_error(storage: LocalStorage) -> None:
    receipt, _ = write_shard(storage, FOLDER, make_samples())
    opened = OpenShard(storage, receipt)
    first, *_, last = receipt.samples
    os.truncate(storage.path(receipt.tar), last.offset + last.length - 1)
    assert opened.read(first)
    with pytest.raises(CacheError, match=f"{receipt.tar}: sample {last.key} is damaged"):
        opened.read(last)


def test_flipped_bits_truncations_and_other_json_are_no_receipt() -> None:
    draws = random.Random(0)
    other_keys = sealed(unsealed(RECEIPT) | {"shard": key_of("other")})
    for content in (b"null", b"\xff", sealed({}), sealed({"samples": [None]}), other_keys):
        with pytest.raises(CacheError, match=r"^here: damaged receipt"):
            parse_receipt(content, "here")
    for size in range(0, len(RECEIPT), 97):
        with pytest.raises(CacheError, match=r"^here: damaged receipt"):
            parse_receipt(RECEIPT[:size], "here")
    for position in draws.sample(range(len(RECEIPT)), 200):
        flipped = bytearray(RECEIPT)
        flipped[position] ^= 1 << draws.randrange(8)
        if not flipped[position : position + 1].isspace():  # white space between JSON's tokens means nothing
            with pytest.raises(CacheError, match=r"^here: damaged receipt"):
                parse_receipt(bytes(flipped), "here")


def changed(change: Callable[[dict[str, Any]], Any]) -> bytes:
    """Return a receipt with the right hash of itself and a changed body; its name follows its keys."""
    body = unsealed(RECEIPT)
    change(body)
    body["shard"] = shard_name([*(place["key"] for place in body["samples"]), *body["skipped"]], body["attempt"])
    return sealed(body)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(size=2**40),
        lambda body: body.update(size=512),
        lambda body: body.update(sha256="../../etc/passwd"),
        lambda body: body.pop("folder"),
        lambda body: body["samples"][0].update(key="../../etc/passwd"),
        lambda body: body["samples"][0].update(offset=-512),
        lambda body: body["samples"][0].update(length=2**40),
        lambda body: body["skipped"].update({"no key": "broken"}),
        *(
            lambda body, values=values: body["samples"][0]["tensors"]["moments"].update(values)
            for values in (
                {"offset": 0},
                {"shape": [2**40, 2**40]},
                {"shape": [-1, -1]},
                {"dtype": "I64"},
                {"dtype": "F64"},
            )
        ),
    ],
)
def test_receipt_that_leaves_its_shard_is_refused(change: Callable[[dict[str, Any]], Any]) -> None:
    parse_receipt(changed(lambda _: None), "here")
    with pytest.raises(CacheError, match=r"^here: damaged receipt"):
        parse_receipt(changed(change), "here")


def test_receipt_in_another_place_is_refused(storage: LocalStorage) -> None:
    receipt, _ = write_shard(storage, FOLDER, make_samples())
    content = receipt_bytes(receipt)
    for name in (f"{FOLDER}/{key_of('other')}.json", f"latents/4567/9x32x48/{receipt.shard}.json"):
        storage.publish(name, content)
        with pytest.raises(CacheError, match=f"{name}: the receipt of {receipt.name}"):
            read_receipt(storage, name)


@pytest.mark.parametrize("stored", ["whole", "torn", "flipped"])
def test_tar_without_receipt_is_completed(storage: LocalStorage, stored: str) -> None:
    """A crash leaves it whole, or torn if the disk ignores fsync."""
    samples = make_samples()
    content, receipt = pack_shard(FOLDER, samples)
    storage.publish(receipt.tar, {"whole": content, "torn": content[:2000], "flipped": content[:-1] + b"\1"}[stored])
    written = len(receipt_bytes(receipt)) + (0 if stored == "whole" else len(content))
    assert write_shard(storage, FOLDER, samples) == (receipt, written)
    assert storage.path(receipt.tar).read_bytes() == content
    assert write_shard(storage, FOLDER, samples) == (receipt, 0)


def test_writer_beaten_to_the_receipt_returns_the_first(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make_samples(), make_samples(scale=1.001)
    content, receipt = pack_shard(FOLDER, first)
    publish = storage.publish

    def beaten(name: str, mine: bytes, *, replace: bool = False) -> bool:
        if name.endswith(".json"):
            publish(receipt.tar, content)
            publish(name, receipt_bytes(receipt))
        return publish(name, mine, replace=replace)

    monkeypatch.setattr(storage, "publish", beaten)
    assert write_shard(storage, FOLDER, second) == (receipt, len(pack_shard(FOLDER, second)[0]))


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_shard_of_real_size_is_written_in_little_memory(storage: LocalStorage) -> None:
    """64 clips of 49x480x720 take 410 MB on disk."""
    clip = torch.zeros(32, 13, 60, 90)

    def write() -> None:
        before = psutil.Process().memory_info().rss
        with ShardWriter(storage, FOLDER) as writer:
            for number in range(64):
                writer.add(Sample(f"{number:032x}", {"moments": clip.half() + number, "image": clip.half()[:14]}, {}))
            writer.finish({}, 0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        assert peak - before < 200e6

    assert ended(in_child(write)) == 0
    assert sum(storage.files(FOLDER).values()) > 400e6

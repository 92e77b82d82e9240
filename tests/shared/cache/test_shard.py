"""One shard: what plain webdataset sees, what our reader sees, and what a receipt refuses."""

import gc
import hashlib
import io
import json
import random
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_safetensors

from shared.cache.collection import MAPPED_SHARDS, Collection, SampleReader, collection_for, shards, write_recipe
from shared.cache.shard import (
    MappedShard,
    Sample,
    pack_shard,
    parse_receipt,
    receipt_bytes,
    shard_name,
    write_shard,
)
from shared.cache.storage import LocalStorage
from shared.cache.verify import check_shard, verify
from shared.errors import CacheError
from shared.fingerprint import key_of

FOLDER = "latents/0123/9x32x48"


def make_samples(count: int = 3, seed: int = 0) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Sample(
            key_of([seed, number]),
            {
                "moments": torch.randn(32, 3, 4, 6 + number, generator=generator).to(torch.bfloat16),
                "image_moments": torch.randn(2, 32, 1, 4, 6, generator=generator),
            },
            {"bucket": "9x32x48", "number": number},
        )
        for number in range(count)
    ]


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path / "cache"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its file to the collector
def test_webdataset_streams_the_samples_that_our_reader_gives(storage):
    samples = {sample.key: sample for sample in make_samples()}
    receipt, _ = write_shard(storage, FOLDER, list(samples.values()))
    tar = f"{FOLDER}/{receipt.shard}.tar"
    mapped = MappedShard(storage, tar, receipt)
    streamed = list(webdataset.WebDataset(str(storage.path(tar)), shardshuffle=False))
    assert [item["__key__"] for item in streamed] == sorted(samples)
    for item, place in zip(streamed, receipt.samples, strict=True):
        sample = samples[item["__key__"]]
        theirs, ours = load_safetensors(item["safetensors"]), mapped.tensors(place)
        assert theirs.keys() == ours.keys() == sample.tensors.keys()
        for name, tensor in sample.tensors.items():
            assert torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype
            assert torch.equal(theirs[name], tensor)
        assert json.loads(item["json"]) == sample.facts
    gc.collect()


def test_equal_samples_give_equal_bytes_in_any_order():
    samples = make_samples(5)
    content, receipt = pack_shard(samples, {key_of("bad"): "broken"}, 2)
    again, same = pack_shard(list(reversed(samples)), {key_of("bad"): "broken"}, 2)
    assert content == again and receipt == same
    assert hashlib.sha256(content).hexdigest() == receipt.sha256 and len(content) == receipt.size
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == sorted(member.name for member in members)
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in members} == {
        (0, 0, 0, "", "", 0o644, tarfile.REGTYPE)
    }


def test_the_bytes_of_a_known_shard_stay_what_they_are():
    """Renew only with a new `pixels.TRANSFORM` or a new cache folder: stored shards would not be found again."""
    content, receipt = pack_shard([Sample("0" * 32, {"moments": torch.arange(24.0).view(2, 3, 1, 2, 2)}, {"a": 1})])
    assert receipt.shard == "d6b1039baf78122c83554e6cc9903c55"
    assert hashlib.sha256(content).hexdigest()[:16] == "fe4e355da0baf0af"


def test_a_shards_name_depends_on_its_keys_and_attempt_only():
    keys = [key_of(number) for number in range(4)]
    assert shard_name(keys) == shard_name(reversed(keys)) == pack_shard([Sample(k, {}, {}) for k in keys])[1].shard
    assert len({shard_name(keys), shard_name(keys[1:]), shard_name(keys, 1)}) == 3


def test_tensors_are_aligned_views_of_the_file_and_writing_to_one_stays_private(storage):
    receipt, _ = write_shard(storage, FOLDER, make_samples())
    tar = f"{FOLDER}/{receipt.shard}.tar"
    before = storage.path(tar).read_bytes()
    tensors = MappedShard(storage, tar, receipt).tensors(receipt.samples[0])
    assert all(tensor.data_ptr() % 8 == 0 for tensor in tensors.values())
    tensors["moments"].zero_()
    assert storage.path(tar).read_bytes() == before


@settings(max_examples=300)
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_any_flipped_bit_of_a_receipt_is_refused(position, bit):
    content = bytearray(receipt_bytes(pack_shard(make_samples(2))[1]))
    position %= len(content)
    content[position] ^= 1 << bit
    if content[position : position + 1].isspace():
        return  # white space between JSON's tokens says nothing
    with pytest.raises(CacheError, match=r"^here: damaged receipt"):
        parse_receipt(bytes(content), "here")


def test_every_truncation_of_a_receipt_is_refused():
    content = receipt_bytes(pack_shard(make_samples(1))[1])
    for size in range(len(content)):
        with pytest.raises(CacheError, match=r"^here: damaged receipt"):
            parse_receipt(content[:size], "here")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_json_that_is_no_receipt_is_refused(value):
    with pytest.raises(CacheError):
        parse_receipt(json.dumps(value).encode(), "here")


def forged(changes: dict[str, object]) -> bytes:
    """A receipt whose own hash is right and whose content is not."""
    from shared.cache.shard import _receipt_hash

    body = json.loads(receipt_bytes(pack_shard(make_samples(2))[1]))
    del body["receipt_sha256"]
    place = body["samples"][0]
    for name, value in changes.items():
        if name in body:
            body[name] = value
        elif name in place:
            place[name] = value
        else:
            place["tensors"]["moments"][name] = value
    return json.dumps({**body, "receipt_sha256": _receipt_hash(body)}).encode()


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 0},
        {"size": 2**40},
        {"size": 512},
        {"sha256": 7, "shard": "0" * 32},
        {"key": "../../etc/passwd"},
        {"offset": -512},
        {"length": 10**9},
        {"shape": [2**40, 2**40]},
        {"shape": [32, 0, 4, 6]},
        {"shape": [-1, -1]},
        {"dtype": "I64"},
        {"dtype": "F64"},
        {"skipped": [1]},
    ],
)
def test_a_receipt_that_points_outside_its_shard_is_refused(changes):
    parse_receipt(forged({}), "here")
    with pytest.raises(CacheError, match=r"^here: damaged receipt"):
        parse_receipt(forged(changes), "here")


def test_a_forged_key_or_a_tensor_before_its_sample_is_refused():
    """The name follows from the keys here, so that only the key itself is wrong."""
    from shared.cache.shard import _receipt_hash

    for spoil, message in (
        (lambda place: place.update(key="../../etc/passwd"), "bad key"),
        (lambda place: place["tensors"]["moments"].update(offset=0), "lies outside its sample"),
    ):
        body = json.loads(receipt_bytes(pack_shard(make_samples(2))[1]))
        del body["receipt_sha256"]
        spoil(body["samples"][0])
        body["shard"] = shard_name(place["key"] for place in body["samples"])
        with pytest.raises(CacheError, match=rf"^here: damaged receipt \(.*{message}"):
            parse_receipt(json.dumps({**body, "receipt_sha256": _receipt_hash(body)}).encode(), "here")


def test_a_receipt_of_more_samples_than_a_shard_may_have_is_refused(monkeypatch):
    monkeypatch.setattr("shared.cache.shard.SAMPLES_PER_SHARD", 1)
    with pytest.raises(CacheError, match=r"^here: damaged receipt \(impossible size\)"):
        parse_receipt(forged({}), "here")


def stored(storage: LocalStorage, count: int = 1) -> list[str]:
    """`count` shards in a collection with a recipe; the receipts' names."""
    recipe = {"kind": "latents"}
    collection = collection_for("latents", recipe)
    write_recipe(storage, collection, recipe)
    for seed in range(count):
        write_shard(storage, f"{collection.folder}/9x32x48", make_samples(2, seed))
    return [name for name, _ in shards(storage, collection.folder)]


def test_every_flipped_bit_of_a_shard_is_found_and_the_file_named(storage):
    [tar] = stored(storage)
    path, draws = storage.path(tar), random.Random(0)
    content = path.read_bytes()
    receipt = tar.removesuffix(".tar") + ".json"
    for position in draws.sample(range(len(content)), 200):
        flipped = bytearray(content)
        flipped[position] ^= 1 << draws.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(CacheError, match=tar):
            check_shard(storage, receipt)
    path.write_bytes(content)
    check_shard(storage, receipt)


def test_a_truncated_or_missing_shard_is_refused_on_opening(storage):
    [tar] = stored(storage)
    path = storage.path(tar)
    content = path.read_bytes()
    for size in (0, 1, 512, len(content) // 2, len(content) - 512, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(CacheError, match=f"{tar}: has {size} bytes where its receipt says {len(content)}"):
            list(shards(storage, "latents"))
    path.unlink()
    with pytest.raises(CacheError, match=f"{tar}: is missing"):
        list(shards(storage, "latents"))


def test_a_shard_that_shrinks_or_grows_after_it_was_listed_is_refused_when_it_is_mapped(storage):
    [tar] = stored(storage)
    [(_, receipt)] = shards(storage, "latents")
    content = storage.path(tar).read_bytes()
    for other in (content[:-512], content + bytes(512)):
        storage.publish(tar, other, replace=True)
        with pytest.raises(CacheError, match=f"{tar}: {len(other)} bytes where its receipt says {len(content)}"):
            MappedShard(storage, tar, receipt)


def test_swapped_files_are_refused(storage):
    first, second = stored(storage, 2)
    one, two = storage.path(first), storage.path(second)
    a, b = one.read_bytes(), two.read_bytes()
    assert len(a) == len(b), "sizes alone must not tell them apart"
    one.write_bytes(b)
    two.write_bytes(a)
    checked, damaged = verify(storage, repair=False)
    assert checked == 2 and len(damaged) == 2 and first in damaged[0] and second in damaged[1]
    one.write_bytes(a)
    two.write_bytes(b)
    assert verify(storage, repair=False) == (2, [])
    receipts = [path.with_suffix(".json") for path in (one, two)]
    c, d = (path.read_bytes() for path in receipts)
    receipts[0].write_bytes(d)
    receipts[1].write_bytes(c)
    assert len(verify(storage, repair=False)[1]) == 2


def test_verify_names_the_damaged_shard_and_sets_it_aside_when_asked(storage):
    good, bad = stored(storage, 2)
    content = bytearray(storage.path(bad).read_bytes())
    content[600] ^= 4
    storage.path(bad).write_bytes(content)
    assert verify(storage, repair=False)[1] == verify(storage, repair=True)[1] != []
    assert [name for name, _ in shards(storage, "latents")] == [good]
    assert storage.path(bad).with_name(storage.path(bad).name + ".damaged").is_file()
    assert verify(storage, repair=False) == (1, [])


def test_verify_finds_damaged_recipes_and_plans_and_a_shard_whose_recipe_is_gone(storage):
    [tar] = stored(storage)
    recipe = f"{tar.rpartition('/9x')[0]}/recipe.json"
    storage.publish("plans/p.json", b"\0\0")
    storage.publish("plans/q.json", b"[1]")
    storage.publish(
        "plans/good.json", json.dumps([{"folder": "latents/r/b", "batches": [[key_of(0)]], "attempt": 0}]).encode()
    )
    for name, content in ((recipe, b"{}"), (tar, b"torn")):
        storage.publish(name, content, replace=True)
    found = verify(storage, repair=True)[1]
    names = (recipe, "plans/p.json", "plans/q.json", tar)
    assert len(found) == 4 and all(any(name in line for line in found) for name in names)
    assert verify(storage, repair=False) == (0, [])
    [tar] = stored(storage)
    storage.set_aside(recipe)
    storage.publish(tar, b"torn", replace=True)
    assert [tar in line for line in verify(storage, repair=False)[1]] == [True]


def test_verify_sets_aside_a_damaged_view_and_a_tar_that_leads_nowhere(storage):
    [tar] = stored(storage)
    storage.publish("datasets/clips.parquet", b"x")
    storage.publish("datasets/clips.json", b"{}")
    storage.path(tar).unlink()
    storage.path(tar).symlink_to("nowhere")
    assert len(verify(storage, repair=True)[1]) == 2
    assert verify(storage, repair=False) == (0, [])
    assert not [path for path in storage.root.rglob("*") if path.is_symlink() and not path.name.endswith(".damaged")]
    assert storage.names("datasets", "") == ["datasets/clips.json.damaged", "datasets/clips.parquet.damaged"]


@pytest.mark.parametrize("left", ["whole", "torn", "empty", "other", "padding"])
def test_a_tar_without_receipt_does_not_exist_and_is_made_whole(storage, left):
    samples = make_samples()
    content, receipt = pack_shard(samples)
    tar = f"{FOLDER}/{receipt.shard}.tar"
    leftover = {"whole": content, "torn": content[:2000], "empty": b"", "other": bytes(len(content))}
    leftover |= {"padding": content[:-1] + b"\1"}  # every member is whole, and the bytes are not those of its hash
    storage.path(tar).parent.mkdir(parents=True)
    storage.path(tar).write_bytes(leftover[left])
    assert list(shards(storage, "latents")) == []
    assert write_shard(storage, FOLDER, samples)[0] == receipt
    assert storage.path(tar).read_bytes() == content
    assert [found for _, found in shards(storage, "latents")] == [receipt]


def test_a_lost_tar_so_small_that_it_looks_like_an_empty_one_is_made_again(storage):
    """Zeros of 10240 bytes are what a tar without members is, which is what a shard of skipped clips has."""
    samples = [Sample(key_of(0), {"moments": torch.ones(2)}, {})]
    content, receipt = pack_shard(samples)
    tar = f"{FOLDER}/{receipt.shard}.tar"
    assert len(content) == len(pack_shard([], {key_of(0): "skipped"})[0])
    storage.publish(tar, bytes(len(content)))
    assert write_shard(storage, FOLDER, samples)[0] == receipt
    assert storage.path(tar).read_bytes() == content


def test_only_bytes_that_were_written_are_counted(storage):
    samples = make_samples()
    content, receipt = pack_shard(samples)
    tar, vouching = f"{FOLDER}/{receipt.shard}.tar", receipt_bytes(receipt)
    assert write_shard(storage, FOLDER, samples) == (receipt, len(content) + len(vouching))
    assert write_shard(storage, FOLDER, samples) == (receipt, 0)
    storage.path(tar).with_suffix(".json").unlink()
    assert write_shard(storage, FOLDER, samples) == (receipt, len(vouching))
    storage.path(tar).with_suffix(".json").unlink()
    storage.publish(tar, content[:2000], replace=True)
    assert write_shard(storage, FOLDER, samples) == (receipt, len(content) + len(vouching))


def test_a_finished_shard_is_left_as_it_is(storage):
    samples = make_samples()
    receipt, _ = write_shard(storage, FOLDER, samples)
    paths: Sequence[Path] = sorted(storage.path(FOLDER).iterdir())
    before = [(path, path.stat().st_mtime_ns, path.stat().st_ino) for path in paths]
    other = [Sample(sample.key, {"moments": torch.zeros(1)}, sample.facts) for sample in samples]
    assert write_shard(storage, FOLDER, other)[0] == receipt
    assert [(path, path.stat().st_mtime_ns, path.stat().st_ino) for path in paths] == before


def test_a_finished_shard_that_is_torn_is_for_verify_and_not_for_a_writer_with_other_bytes(storage):
    samples = make_samples()
    receipt, _ = write_shard(storage, FOLDER, samples)
    tar = storage.path(f"{FOLDER}/{receipt.shard}.tar")
    tar.write_bytes(tar.read_bytes()[:1000])
    other = [Sample(sample.key, {"moments": torch.zeros(1)}, sample.facts) for sample in samples]
    assert write_shard(storage, FOLDER, other)[0] == receipt
    assert tar.stat().st_size == 1000


def test_a_writer_that_comes_second_with_its_receipt_gets_the_first_ones(storage, monkeypatch):
    samples = make_samples(2)
    receipt = pack_shard(samples[:1], {samples[1].key: "timed out"})[1]
    theirs, publish = replace(receipt, skipped={samples[1].key: "not to be decoded"}), storage.publish

    def beaten(name: str, content: bytes, *, replace: bool = False) -> bool:
        if name.endswith(".json"):
            publish(name, receipt_bytes(theirs))
        return publish(name, content, replace=replace)

    monkeypatch.setattr(storage, "publish", beaten)
    assert write_shard(storage, FOLDER, samples[:1], {samples[1].key: "timed out"})[0] == theirs


def test_the_receipt_belongs_to_the_tar_that_was_there_first(storage):
    """Two GPUs round differently, and one of them could not decode a clip that the other could."""
    ours = make_samples(3)
    theirs = [Sample(s.key, {name: tensor * 1.05 for name, tensor in s.tensors.items()}, s.facts) for s in ours[:2]]
    content, receipt = pack_shard(theirs, {ours[2].key: "timed out"})
    tar = f"{FOLDER}/{receipt.shard}.tar"
    storage.publish(tar, content)
    written, _ = write_shard(storage, FOLDER, ours)
    assert (written.sha256, written.samples) == (receipt.sha256, receipt.samples)
    assert written.skipped == {ours[2].key: "skipped by another worker"}
    check_shard(storage, tar.removesuffix(".tar") + ".json")


@pytest.mark.parametrize("harm", ["page", "value", "exponent", "nan"])
def test_a_tar_that_was_damaged_while_it_had_no_receipt_is_replaced(storage, harm):
    """It is a whole tar all the same; only what was encoded anew tells."""
    ours = [Sample(key_of(0), {"moments": torch.randn(8, 9, 60, 90, generator=torch.Generator().manual_seed(0))}, {})]
    harmed = ours[0].tensors["moments"].clone()
    flat = harmed.view(-1)
    if harm == "page":
        flat[5000:6024] = 0
    elif harm == "value":
        flat[torch.argmax(flat)] = 0
    else:
        flat[777] *= 2.0**20 if harm == "exponent" else torch.nan
    content, receipt = pack_shard(ours)
    storage.publish(f"{FOLDER}/{receipt.shard}.tar", pack_shard([Sample(ours[0].key, {"moments": harmed}, {})])[0])
    assert write_shard(storage, FOLDER, ours)[0] == receipt
    assert storage.path(f"{FOLDER}/{receipt.shard}.tar").read_bytes() == content


def test_a_tar_without_receipt_that_holds_other_keys_is_replaced(storage):
    ours = make_samples(2)
    content, receipt = pack_shard(ours)
    tar = f"{FOLDER}/{receipt.shard}.tar"
    for left in (make_samples(2, seed=9), make_samples(3), [*ours[:1], *make_samples(2, seed=9)]):
        storage.publish(tar, pack_shard(left)[0], replace=True)
        assert write_shard(storage, FOLDER, ours)[0] == receipt
        assert storage.path(tar).read_bytes() == content
        storage.path(f"{FOLDER}/{receipt.shard}.json").unlink()


def reader_of(storage: LocalStorage, tar: str, keys: list[str] | None = None) -> SampleReader:
    return SampleReader(storage, Collection(*tar.split("/")[:2]), keys)


def test_each_sample_of_a_mapped_shard_is_compared_with_its_hash(storage):
    [tar] = stored(storage)
    [(_, receipt)] = shards(storage, "latents")
    content = bytearray(storage.path(tar).read_bytes())
    first, second = receipt.samples
    content[second.offset + second.length - 1] ^= 1
    storage.path(tar).write_bytes(content)
    reader = reader_of(storage, tar)
    reader.read(first.key)
    with pytest.raises(CacheError, match=f"{tar}: sample {second.key} is damaged"):
        reader.read(second.key)
    with pytest.raises(CacheError, match=f"{tar}: sample {second.key} is damaged"):
        check_shard(storage, tar.removesuffix(".tar") + ".json")


def test_only_the_shards_that_will_be_asked_for_count_and_the_one_used_last_stays_mapped(storage, monkeypatch):
    tars = stored(storage, MAPPED_SHARDS + 1)
    keys = {tar: receipt.samples[0].key for tar, receipt in shards(storage, "latents")}
    wanted = reader_of(storage, tars[0], [keys[tars[0]]])
    assert list(wanted.shard_bytes) == [tars[0]] and wanted.copies_bytes == storage.size(tars[0])
    reader, mapped = reader_of(storage, tars[0]), []

    class Counted(MappedShard):
        def __init__(self, storage: LocalStorage, tar_name: str, receipt: object) -> None:
            mapped.append(tar_name)
            super().__init__(storage, tar_name, receipt)  # type: ignore[arg-type]

    monkeypatch.setattr("shared.cache.collection.MappedShard", Counted)
    for tar in (*tars[:-1], tars[0], tars[-1], tars[0]):
        reader.read(keys[tar])
    assert mapped == tars

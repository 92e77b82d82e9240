"""Components of a checkpoint on disk: found, described, or refused in one line."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import save_file

from shared.config import Model
from shared.errors import UsageError
from shared.model.pretrained import (
    present_part,
    pretrained_folder,
    pretrained_part,
    read_config,
)
from tests.tiny import build_text_encoder, build_transformer

WEIGHTS = "diffusion_pytorch_model.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def checkpoint(root: Path, dtype: torch.dtype = torch.float32, part: str = "transformer") -> Path:
    """Write a component of two tensors; return its folder."""
    folder = root / part
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_diffusers_version": "0.0", "patch_size": 2}), "utf-8")
    save_file({"big": torch.ones(64, dtype=dtype), "small": torch.ones(2)}, folder / WEIGHTS)
    return folder


def local(root: Path, variant: str | None = None) -> Model:
    return Model(pretrained_model_name_or_path=str(root), variant=variant)


def test_settings_leave_out_versions_and_the_precision_is_that_of_most_weights(tmp_path: Path) -> None:
    checkpoint(tmp_path, torch.bfloat16)
    part = pretrained_part(local(tmp_path), "transformer")
    assert part.config == {"_diffusers_version": "0.0", "patch_size": 2}
    assert part.settings == {"patch_size": 2} and part.dtype() == "bf16"


def test_sharded_weights_are_found_through_their_index_and_load(tmp_path: Path) -> None:
    transformer = build_transformer("5b")
    folder = tmp_path / "transformer"
    transformer.save_pretrained(folder, max_shard_size="100KB")
    part = pretrained_part(local(tmp_path), "transformer")
    assert len(part.weights) > 2
    assert set(part.weights) == set(folder.glob("*.safetensors"))
    assert part.dtype() == "fp32"
    loaded = CogVideoXTransformer3DModel.from_pretrained(str(part.folder), use_safetensors=True)
    expected = transformer.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({"weight_map": {"a": "../secret.safetensors"}}, "not found: ../secret.safetensors"),
        ({"weight_map": {"a": "gone.safetensors"}}, "weight files not found: gone.safetensors"),
        ({"weight_map": {}}, "not found: none named"),
        ({"weight_map": {"a": 1}}, "not an index"),
        ({}, "not an index"),
    ],
    ids=str,
)
def test_index_that_leaves_its_folder_or_is_none_is_refused(index: object, reason: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    (folder / WEIGHTS).rename(tmp_path / "secret.safetensors")
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(UsageError, match=reason):
        pretrained_part(local(tmp_path), "transformer")


def test_variant_files_are_chosen_by_name_single_or_sharded(tmp_path: Path) -> None:
    transformer = build_transformer("2b")
    folder = tmp_path / "transformer"
    transformer.save_pretrained(folder)
    transformer.to(torch.float16).save_pretrained(folder, variant="fp16")
    assert pretrained_part(local(tmp_path), "transformer").dtype() == "fp32"
    part = pretrained_part(local(tmp_path, "fp16"), "transformer")
    assert [path.name for path in part.weights] == ["diffusion_pytorch_model.fp16.safetensors"]
    assert (part.variant, part.dtype()) == ("fp16", "fp16")

    sharded = tmp_path / "sharded" / "transformer"
    transformer.save_pretrained(sharded, variant="fp16", max_shard_size="50KB")
    assert len(pretrained_part(local(sharded.parent, "fp16"), "transformer").weights) > 1
    with pytest.raises(UsageError, match="no safetensors weights; "):
        pretrained_part(local(sharded.parent), "transformer")
    with pytest.raises(UsageError, match="no safetensors weights of variant 'bf16'"):
        pretrained_part(local(sharded.parent, "bf16"), "transformer")


def test_text_encoder_of_a_variant_falls_back_to_plain_files(tmp_path: Path) -> None:
    build_text_encoder().save_pretrained(tmp_path / "text_encoder")
    part = pretrained_part(local(tmp_path, "fp16"), "text_encoder")
    assert part.variant is None
    assert [path.name for path in part.weights] == ["model.safetensors"]


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_named_and_refused(name: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    (folder / WEIGHTS).rename(folder / name)
    with pytest.raises(UsageError, match=rf"only pickled weights \({name}\), which are not loaded"):
        pretrained_part(local(tmp_path), "transformer")
    assert present_part(local(tmp_path), "transformer") is None


def test_missing_part_is_named(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    with pytest.raises(UsageError, match="vae/ not found"):
        pretrained_folder(local(tmp_path), "vae")
    with pytest.raises(UsageError, match="neither a local folder nor a reachable hub model"):
        pretrained_folder(local(tmp_path / "not" / "there" / "at all"), "vae")


def test_torn_or_foreign_weights_are_refused_by_name(tmp_path: Path) -> None:
    file = checkpoint(tmp_path) / WEIGHTS
    whole = file.read_bytes()
    save_file({"a": torch.ones(4, dtype=torch.int8)}, tmp_path / "int8.safetensors")
    whole_header = int.from_bytes(whole[:8], "little") + 8
    for content in (whole[:-1], whole[:whole_header], whole[:20], b"", b"\xff" * 64):
        file.write_bytes(content)
        with pytest.raises(UsageError, match=f"{WEIGHTS}: not a whole safetensors file"):
            pretrained_part(local(tmp_path), "transformer").dtype()
    shutil.copy(tmp_path / "int8.safetensors", file)
    with pytest.raises(UsageError, match="expected F32, F16 or BF16 weights, got I8"):
        pretrained_part(local(tmp_path), "transformer").dtype()


def test_config_that_is_no_json_object_or_of_absurd_size_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for content in (b"", b"[1]", b"{", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"config\.json: "):
            read_config(path)
    os.truncate(path, 2**40)  # sparse
    with pytest.raises(UsageError, match="the limit is"):
        read_config(path)


def test_marks_change_with_the_files_and_hashes_with_their_bytes(tmp_path: Path) -> None:
    file = checkpoint(tmp_path) / WEIGHTS
    part = pretrained_part(local(tmp_path), "transformer")
    marks, hashes = part.marks, part.sha256()
    assert hashes == [hashlib.sha256(file.read_bytes()).hexdigest()]
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # size and mtime are as before
    assert part.marks != marks and part.sha256() != hashes


def hub_cache(folder: Path, part: Path) -> Path:
    """Write the hub's cache layout: a snapshot of links to blobs, named by sha256 or git hash; return it."""
    repository = folder / "models--someone--tiny-cogvideox"
    snapshot = repository / "snapshots" / COMMIT / part.name
    blobs = repository / "blobs"
    for path in (snapshot, blobs, repository / "refs"):
        path.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(COMMIT, "utf-8")
    for file in part.iterdir():
        content = file.read_bytes()
        kind = hashlib.sha256 if file.suffix == ".safetensors" else hashlib.sha1
        blob = blobs / kind(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_hub_snapshot_is_found_without_a_network_and_hashed_by_name(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path / "hub", checkpoint(tmp_path / "source"))
    model = Model(pretrained_model_name_or_path="someone/tiny-cogvideox", model_cache_dir=tmp_path / "hub")
    part = present_part(model, "transformer")
    assert part is not None
    assert part.folder == snapshot
    assert part.dtype() == "fp32"
    blob = (snapshot / WEIGHTS).resolve()
    blob.write_bytes(b"not what its name says")  # so a hash that equals the name was not computed
    assert part.sha256() == [blob.name]
    assert present_part(model, "vae") is None, "not downloaded"
    with pytest.raises(UsageError, match="vae/ not found"):
        pretrained_part(model, "vae")
    other = model.model_copy(update={"revision": "v2"})
    assert present_part(other, "transformer") is None, "another revision"
    pinned = model.model_copy(update={"revision": COMMIT})
    assert present_part(pinned, "transformer") is not None


def test_mistyped_folder_is_not_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo/tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name, near in (("demo/tinyy", "demo/tiny"), (f"{tmp_path}/demo/tine", f"{tmp_path}/demo/tiny")):
        with pytest.raises(UsageError, match=rf"'{name}': not found; did you mean {near}\?$"):
            pretrained_folder(Model(pretrained_model_name_or_path=name), "vae")

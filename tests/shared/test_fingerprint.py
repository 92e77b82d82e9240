"""Hashes of values and files."""

import os
from pathlib import Path
from typing import Any

import pytest

from shared.fingerprint import canonical_json, key_of, sha256_file, sha256_files


def test_only_equal_values_share_a_key() -> None:
    assert canonical_json({"b": 1, "a": [True, None, "ü"]}) == '{"a":[true,null,"ü"],"b":1}'.encode()
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    values = [0, 0.5, False, None, "", "0", [], [0], {}, {"a": 0}, {"a": "0"}, [[0]], {"a": {"b": 0}}]
    assert len({key_of(value) for value in values}) == len(values)


def test_keys_never_change() -> None:
    """Never renew this number: stored caches are found by their keys."""
    assert key_of({"text": "a rabbit", "recipe": "r"}) == "067df9e1ee5cd70aa21484c03bfa4fa0"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_numbers_outside_json_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        key_of(value)


def test_a_file_is_hashed_and_a_hub_blob_is_not_read(tmp_path: Path) -> None:
    blob = tmp_path / ("ab" * 32)
    blob.write_bytes(b"not what the name says, so it was not read")
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    assert sha256_file(link) == "ab" * 32
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(b"x")
    before = sha256_file(copy)
    os.utime(copy, (1, 1))
    assert sha256_file(copy) == before == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    plain = tmp_path / ("cd" * 32)
    plain.write_bytes(b"x")
    assert sha256_file(plain) == before, "only a link's target is a hub blob"
    other = tmp_path / "link.safetensors"
    other.symlink_to(copy)
    assert sha256_file(other) == before, "only a hash as a name is believed"
    assert sha256_files([link, copy]) == {"copy.safetensors": before, "model.safetensors": "ab" * 32}

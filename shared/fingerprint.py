"""Hashes that name things: bytes, weights, settings. Names, paths, times and hosts never enter one."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]

KEY_LENGTH = 32
"""Hex digits of a key, recipe or shard name (128 bits)."""


def canonical_json(value: Json) -> bytes:
    """One spelling for equal values: sorted keys, no spaces, UTF-8; raises `ValueError` on NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def key_of(value: Json) -> str:
    """The key that names `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()[:KEY_LENGTH]


def is_key(text: str) -> bool:
    return re.fullmatch(rf"[0-9a-f]{{{KEY_LENGTH}}}", text) is not None


def sha256_file(path: Path) -> str:
    """Hash of a file's bytes; a hub blob is a link to a file named by its sha256, so that name is used."""
    if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob := path.resolve().name):
        return blob
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(paths: Sequence[Path]) -> dict[str, str]:
    """File name -> sha256, for the parts of one component."""
    return {path.name: sha256_file(path) for path in sorted(paths)}

"""Hashes that name bytes, weights and settings. Names, paths, times and hosts are never part of one."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]

_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
KEY_LENGTH = 32
"""Hex digits of a key, recipe or shard name (128 bits)."""


def canonical_json(value: Json) -> bytes:
    """Return the one spelling of `value`: sorted keys, no spaces, UTF-8; raises `ValueError` on NaN."""
    return _ENCODER.encode(value).encode()


def key_of(value: Json) -> str:
    """Return the key that names `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()[:KEY_LENGTH]


def sealed(body: Mapping[str, Any]) -> bytes:
    """Return `body` as readable JSON that also holds its own hash; `unsealed` is the inverse."""
    seal = hashlib.sha256(canonical_json(body)).hexdigest()
    return json.dumps({**body, "self_sha256": seal}, sort_keys=True, indent=1, ensure_ascii=False).encode()


def unsealed(content: bytes) -> dict[str, Any]:
    """Return the body of sealed JSON; raises `ValueError` if it differs from its hash in a single bit."""
    try:
        body: dict[str, Any] = json.loads(content)
        claimed = body.pop("self_sha256")
        found = hashlib.sha256(canonical_json(body)).hexdigest()
    except (AttributeError, KeyError, TypeError, RecursionError, UnicodeError) as error:
        raise ValueError(f"not a JSON object with its own hash ({type(error).__name__})") from None
    if claimed != found:
        raise ValueError("its own hash does not match")
    return body


def sha256_file(path: Path) -> str:
    """Return the hash of a file's bytes; a hub blob is a symlink to a file named by its sha256, which is used."""
    if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob := path.resolve().name):
        return blob
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(paths: Sequence[Path]) -> dict[str, str]:
    """Return file name -> sha256 for the parts of one component."""
    return {path.name: sha256_file(path) for path in sorted(paths)}

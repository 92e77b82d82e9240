"""Stage 1 without its encoders, and forks that run it."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from precompute.assignments import Part, PlannedShard, make_missing
from shared.cache.collection import collection_for, write_recipe
from shared.cache.shard import Sample, write_shard
from shared.cache.storage import LocalStorage
from shared.fingerprint import key_of

RECIPE = {"kind": "latents", "test": "writer"}


COLLECTION = collection_for("latents", RECIPE)


SAMPLES = {
    key_of(number): Sample(key_of(number), {"moments": torch.full((4, 100), float(number))}, {"number": number})
    for number in range(10)
}


SKIPPED = key_of(7)


def work(root: Path, part: Part = Part()) -> None:  # noqa: B008
    """Run stage 1 without its encoders."""
    storage = LocalStorage(str(root))
    write_recipe(storage, COLLECTION, RECIPE)

    def make(todo: Iterator[PlannedShard], _total: int) -> None:
        for shard in todo:
            samples = [SAMPLES[key] for key in shard.keys if key != SKIPPED]
            skipped = {SKIPPED: "broken"} if SKIPPED in shard.keys else {}
            write_shard(storage, shard.folder, samples, skipped, shard.attempt)

    folders = {key: f"{COLLECTION.folder}/{'9x32x48' if int(key, 16) % 2 else '17x32x48'}" for key in SAMPLES}
    make_missing(storage, COLLECTION, folders, make, part, keys_per_shard=2, keys_per_batch=1)


def in_child(body: Callable[[], None]) -> int:
    """Fork, run `body` and exit without Python's clean-up; return the process id."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            body()
            code = 0
        os._exit(code)
    return child


def ended(child: int) -> int:
    """Wait for a child and return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

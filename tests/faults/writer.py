"""A stage 1 without encoders, processes that run it, and one that is killed at a chosen point."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.shards import write_shard
from precompute.assignments import Part, Wanted, shards_to_make, take_inventory, unmade
from shared.cache.collection import collection_for, write_recipe
from shared.cache.shard import Sample
from shared.cache.storage import LocalStorage
from shared.cache.verify import verify
from shared.cache.view import View, ViewRow, write_view
from shared.fingerprint import Json, key_of
from shared.model.geometry import Bucket

RECIPE: dict[str, Json] = {"kind": "latents", "test": "writer"}
COLLECTION = collection_for("latents", RECIPE)
SAMPLES = {
    key_of(number): Sample(key_of(number), {"moments": torch.full((4, 100), float(number))}, {"number": number})
    for number in range(10)
}
SKIPPED = key_of(7)
PROMPTS = collection_for("prompts", {"kind": "prompts", "test": "writer"})


before_effect: Callable[[], None] | None = None


def notice(event: str, arguments: tuple[object, ...]) -> None:
    changes = event in ("os.link", "os.rename", "os.remove", "os.mkdir")
    if before_effect is not None and (changes or (event == "open" and str(arguments[1])[:1] in ("x", "w"))):
        before_effect()


sys.addaudithook(notice)


def work(root: Path, part: Part = Part()) -> None:  # noqa: B008
    """Store all samples but the skipped one."""
    storage = LocalStorage(str(root))
    write_recipe(storage, COLLECTION, RECIPE)
    folders = {key: f"{COLLECTION.folder}/{'9x32x48' if int(key, 16) % 2 else '17x32x48'}" for key in SAMPLES}
    wanted = Wanted(COLLECTION, folders, keys_per_shard=2, keys_per_batch=1)
    shards, inventory = shards_to_make(storage, wanted, take_inventory(storage, COLLECTION), part)
    while shards:
        for shard in unmade(storage, shards):
            samples = [SAMPLES[key] for key in shard.keys if key != SKIPPED]
            write_shard(storage, shard.folder, samples, {SKIPPED: "broken"} if SKIPPED in shard.keys else {})
        shards, inventory = shards_to_make(storage, wanted, inventory, part)


def write_all(root: Path) -> None:
    """Write all that stage 1 writes, without its encoders."""
    work(root)
    bucket = Bucket(9, 32, 48)
    rows = tuple(
        ViewRow(
            f"{number}.mp4",
            0.0,
            1.0,
            bucket.frames,
            bucket.height,
            bucket.width,
            False,
            key,
            ("text",),
            (1.0,),
            (key_of("text"),),
            (0,),
            "skipped" if key == SKIPPED else "train",
            "broken" if key == SKIPPED else "",
        )
        for number, key in enumerate(SAMPLES)
    )
    write_view(LocalStorage(str(root)), View("power", COLLECTION, PROMPTS, {"": key_of("")}, rows))


def in_child(body: Callable[[], object]) -> int:
    """Return the process id of a fork that runs `body` and ends without Python's clean-up."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            body()
            code = 0
        os._exit(code)
    return child


def ended(child: int) -> int:
    """Wait for a child; return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_before(number: int, action: Callable[[], object]) -> int:
    """Run an action in a child that dies before its effect `number` (fsyncs count too); return its exit code."""

    def body() -> None:
        global before_effect
        left = number

        def count() -> None:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

        fsync = os.fsync

        def counted_fsync(fd: Any) -> None:
            count()
            fsync(fd)

        os.fsync = counted_fsync
        before_effect = count
        action()

    return ended(in_child(body))


def check_whole(root: Path) -> None:
    """Assert that every file is whole or invisible to readers."""
    assert verify(LocalStorage(str(root)), repair=False)[1] == []


def finished(root: Path) -> None:
    """Let a last worker finish the cache."""
    assert ended(in_child(lambda: work(root))) == 0

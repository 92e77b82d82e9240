"""What the processes of a run tell each other, and which of them share a machine."""

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch import distributed

from shared.errors import PrecogError

Value = TypeVar("Value")


def gather(value: Value) -> list[Value]:
    """Every process's value, by rank; all of them have to call this together."""
    _, world_size = place()
    if world_size == 1:
        return [value]
    values = [value] * world_size
    distributed.all_gather_object(values, value)
    return values


def place() -> tuple[int, int]:
    """This process's rank, and how many processes there are."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def together(work: Callable[[], Value]) -> Value:
    """The result of `work`, which every process runs: where it fails in one it fails in all, and none waits for it.

    Raises the `PrecogError` of the first that failed, on every process; an `OSError` becomes one. What else fails, a
    fault of ours, keeps its trace where it happened and is a `PrecogError` elsewhere.
    """
    fault: Exception | None = None
    failure = None
    try:
        result = work()
    except PrecogError as error:
        failure = type(error), str(error)
    except OSError as error:
        failure = PrecogError, str(error)
    except Exception as error:
        fault, failure = error, (PrecogError, f"{type(error).__name__}: {error}")
    failures = gather(failure)
    if fault is not None:
        raise fault
    for rank, found in enumerate(failures):
        if found is not None:
            kind, line = found
            raise kind(line if len(failures) == 1 else f"rank {rank}: {line}")
    return result


def on_main(work: Callable[[], Value]) -> Value | None:
    """`together` for what rank 0 alone does, while the others wait; None on those."""
    rank, _ = place()
    return together(lambda: work() if rank == 0 else None)


def machine() -> str:
    """The same in processes that see each other under /proc, and nowhere else."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{platform.node()} {os.getpid()}"

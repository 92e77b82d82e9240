"""Collectives on Python values, and work whose failure on one rank is raised on all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import distributed

from shared.errors import PrecogError

Value = TypeVar("Value")


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


@contextmanager
def peers_answer() -> Iterator[None]:
    """Raise `PrecogError` where a collective fails because another process ended or does not answer."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            raise PrecogError(
                "another process of this run ended or does not answer; read its output, then run the same command again"
            ) from None
        raise


def all_gather(value: Value) -> list[Value]:
    """Return every process's value by rank; a collective."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return [value]
    values = [value] * world_size
    distributed.all_gather_object(values, value)
    return values


def broadcast(value: Value) -> Value:
    """Return the value of rank 0 on every process; a collective."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def on_all_ranks(work: Callable[[], Value]) -> Value:
    """Run `work` on every process; a failure on one is raised on all, so that none waits for another.

    Raises the `PrecogError` of the lowest rank that failed. An `OSError` becomes a `PrecogError`. Any other exception
    keeps its trace on its own rank and is a `PrecogError` on the rest.
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
    failures = all_gather(failure)
    if fault is not None:
        raise fault
    for rank, found in enumerate(failures):
        if found is not None:
            kind, line = found
            raise kind(line if len(failures) == 1 else f"rank {rank}: {line}")
    return result


def on_rank_0(work: Callable[[], Value]) -> Value | None:
    """Run `work` on rank 0 while the other ranks wait, with errors as in `on_all_ranks`; None on the others."""
    rank, _ = rank_and_world_size()
    return on_all_ranks(lambda: work() if rank == 0 else None)

"""The rank of this process among those that torchrun, accelerate or SLURM started, read from the environment."""

import os

from shared.errors import UsageError


def rank() -> int:
    """Return the rank of this process, 0 without a launcher; raise `UsageError` unless 0 <= rank < world size."""
    return _rank_and_world_size()[0]


def world_size() -> int:
    """Return the number of processes that the launcher started; raise as `rank` does."""
    return _rank_and_world_size()[1]


def local_rank() -> int:
    """Return the rank of this process on its machine, 0 without a launcher."""
    return _read(0, "LOCAL_RANK", "SLURM_LOCALID")


def _rank_and_world_size() -> tuple[int, int]:
    number, size = _read(0, "RANK", "SLURM_PROCID"), _read(1, "WORLD_SIZE", "SLURM_NTASKS")
    if number >= size:
        names = "RANK and WORLD_SIZE, or SLURM_PROCID and SLURM_NTASKS"
        raise UsageError(f"{names}: rank {number} of {size} processes, counted from 0; unset both or set both")
    return number, size


def _read(default: int, *variables: str) -> int:
    """Return the value of the first variable that is set; raise `UsageError` if it is not a number."""
    for variable in variables:
        if text := os.environ.get(variable):
            if not (text.isascii() and text.isdigit()):
                raise UsageError(f"{variable} = {text!r} in the environment: a launcher sets it to a number; unset it")
            return int(text)
    return default

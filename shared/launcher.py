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
    return _read(0, "LOCAL_RANK", "SLURM_LOCALID")[0]


def _rank_and_world_size() -> tuple[int, int]:
    number, number_shown = _read(0, "RANK", "SLURM_PROCID")
    size, size_shown = _read(1, "WORLD_SIZE", "SLURM_NTASKS")
    if number >= size:
        raise UsageError(
            f"{number_shown} and {size_shown} in the environment: a launcher sets both and counts ranks from 0; "
            "unset both"
        )
    return number, size


def _read(default: int, *variables: str) -> tuple[int, str]:
    """Return the value of the first variable that is set, and its text; raise `UsageError` if it is not a number."""
    for variable in variables:
        if text := os.environ.get(variable):
            if not (text.isascii() and text.isdigit()):
                raise UsageError(f"{variable} = {text!r} in the environment: a launcher sets it to a number; unset it")
            return int(text), f"{variable} = {text}"
    return default, f"no {variables[0]}"

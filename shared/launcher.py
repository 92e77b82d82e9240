"""This process among those that torchrun, accelerate or SLURM started, as their environment says."""

import os

from shared.errors import UsageError


def rank() -> int:
    """This process's number; 0 alone. Raises `UsageError` if it is none of the world's."""
    return _place()[0]


def world_size() -> int:
    """How many processes the launcher started; raises as `rank`."""
    return _place()[1]


def local_rank() -> int:
    """This process's number among those of its machine; 0 alone."""
    return _number(0, "LOCAL_RANK", "SLURM_LOCALID")


def _place() -> tuple[int, int]:
    """Rank and world size; raises `UsageError` unless 0 <= rank < world size."""
    numbers, sizes = ("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS")
    number, size = _number(0, *numbers), _number(1, *sizes)
    if number >= size:
        raise UsageError(
            f"{_shown(*numbers)} and {_shown(*sizes)} in the environment: a launcher sets both, and numbers its "
            "processes from 0; unset both"
        )
    return number, size


def _shown(*variables: str) -> str:
    """The first variable that is set, with its value."""
    found = next((f"{variable} = {text}" for variable in variables if (text := os.environ.get(variable))), None)
    return found or f"no {variables[0]}"


def _number(alone: int, *variables: str) -> int:
    """Of the first variable that is set; raises `UsageError` if that is no number."""
    for variable in variables:
        if text := os.environ.get(variable):
            if not (text.isascii() and text.isdigit()):
                raise UsageError(f"{variable} = {text!r} in the environment: a launcher sets it to a number; unset it")
            return int(text)
    return alone

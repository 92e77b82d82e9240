"""This process among those that torchrun, accelerate or SLURM started, as their environment says."""

import os

from shared.errors import UsageError


def rank() -> int:
    """This process's number; 0 alone."""
    return _number(0, "RANK", "SLURM_PROCID")


def world_size() -> int:
    """How many processes the launcher started."""
    return _number(1, "WORLD_SIZE", "SLURM_NTASKS")


def local_rank() -> int:
    """This process's number among those of its machine; 0 alone."""
    return _number(0, "LOCAL_RANK", "SLURM_LOCALID")


def _number(alone: int, *variables: str) -> int:
    """Of the first variable that is set; raises `UsageError` if that is no number."""
    for variable in variables:
        if text := os.environ.get(variable):
            if not (text.isascii() and text.isdigit()):
                raise UsageError(f"{variable} = {text!r} in the environment: a launcher sets it to a number; unset it")
            return int(text)
    return alone

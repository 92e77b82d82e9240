"""Devices, dtypes and peak memory, under the names that configs use."""

import resource

import torch

from shared.errors import UsageError
from shared.launcher import local_rank

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def choose_device(requested: str) -> torch.device:
    """Return the requested device; "auto" is this process's GPU, or the CPU without one.

    Raises `UsageError` for a GPU that is not found.
    """
    if requested == "auto":
        return torch.device("cuda", local_rank() % torch.cuda.device_count()) if torch.cuda.is_available() else CPU
    device = torch.device(requested)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device = {requested!r}: torch sees {torch.cuda.device_count()} GPUs; use auto or cpu")
    return device


def peak_memory_bytes(device: torch.device) -> int:
    """Return this process's peak memory: allocated by torch on a GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

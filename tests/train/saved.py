"""Small checkpoints with known content, for tests of files and resume."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.checkpoint.files import COMMIT, STATE, Checkpoint, save_checkpoint

FILES = [COMMIT, STATE, "adapter.safetensors", "optimizer.safetensors"]
Group = dict[str, dict[str, Tensor]]


def content(step: int, variant: int = 0) -> tuple[Group, dict[str, Any]]:
    """Return tensors and state that depend on step and variant, with numbers that are hard to store."""
    generator = torch.Generator().manual_seed(1000 * variant + step)
    groups = {
        "adapter": {f"block.{index}.lora_A": torch.randn(3, 5, generator=generator) for index in range(4)},
        "optimizer": {"exp_avg": torch.randn(7, generator=generator), "step": torch.tensor(float(step))},
    }
    state = {"losses": [0.1 + 0.2, 5e-324, -0.0, 1e300], "position": 2**53 + step, "view": "æ—✓", "none": None}
    return groups, state | {"identity": {}, "base": {"sha256": "", "marks": []}}


def save(run: Path, step: int, variant: int = 0) -> Path:
    """Save that content."""
    return save_checkpoint(run, step, *content(step, variant))


def is_content(found: Checkpoint | None, step: int, variant: int = 0) -> bool:
    """Compare a checkpoint with that content, bit for bit."""
    groups, state = content(step, variant)
    return found is not None and found.step == step and found.state == state and same_bits(found.tensors, groups)


def same_bits(left: Mapping[str, Mapping[str, Tensor]], right: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Compare dtypes, shapes and bytes, so that NaN equals NaN and -0 differs from 0."""

    def raw(groups: Mapping[str, Mapping[str, Tensor]]) -> Any:
        return {
            (file, name): (tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).tolist())
            for file, group in groups.items()
            for name, tensor in group.items()
        }

    return bool(raw(left) == raw(right))


def silence(line: str) -> None:
    """Fail on any report."""
    raise AssertionError(f"reported: {line}")


def names(run: Path) -> list[str]:
    """Return the names in a run folder except temporary ones."""
    return sorted(path.name for path in run.iterdir() if not path.name.startswith(".tmp-"))

"""Checkpoints with known content."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.checkpoint.files import Checkpoint, save_checkpoint

Group = dict[str, dict[str, Tensor]]


def content(step: int, variant: int = 0) -> tuple[Group, dict[str, Any]]:
    generator = torch.Generator().manual_seed(1000 * variant + step)
    groups = {
        "adapter": {f"block.{index}.lora_A": torch.randn(3, 5, generator=generator) for index in range(4)},
        "optimizer": {"exp_avg": torch.randn(7, generator=generator), "step": torch.tensor(float(step))},
    }
    return groups, {"losses": [0.1 + 0.2, 5e-324, -0.0, 1e300], "position": 2**53 + step, "view": "æ—✓", "none": None}


def save(run: Path, step: int, variant: int = 0) -> Path:
    return save_checkpoint(run, step, *content(step, variant))


def is_content(found: Checkpoint, step: int, variant: int = 0) -> bool:
    groups, state = content(step, variant)
    return found.step == step and found.state == state and same_bits(found.tensors, groups)


def same_bits(left: Mapping[str, Mapping[str, Tensor]], right: Mapping[str, Mapping[str, Tensor]]) -> bool:
    def raw(groups: Mapping[str, Mapping[str, Tensor]]) -> Any:
        return {
            (file, name): (tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).tolist())
            for file, group in groups.items()
            for name, tensor in group.items()
        }

    return bool(raw(left) == raw(right))


def silence(line: str) -> None:
    raise AssertionError(f"reported: {line}")


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if not path.name.startswith(".tmp-"))

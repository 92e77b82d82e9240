"""adaLN: the shift, scale and gate rows of a block, a function of the timestep alone while its layers are frozen.

The layers that make them are a fifth of 2B and a seventh of 5B. `ModulationTable` keeps them in host memory and brings
them to the device once per new timestep; the rows themselves (3 MB for 5B) are kept in host memory after that.
"""

from collections.abc import Sequence

import torch
from diffusers.models.normalization import CogVideoXLayerNormZero
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock, CogVideoXTransformer3DModel
from torch import Tensor
from torch.nn import functional

from train.transformer.host_memory import host_copy
from train.transformer.lora_linear import linear

Rows = tuple[Tensor, Tensor]
"""Of a block's first and second norm: [2n,3,D] (shift, scale, gate) in the order text_1, video_1, text_2, ..."""


def modulation_rows(norm: CogVideoXLayerNormZero, temb: Tensor) -> Tensor:
    """[n,T] -> [2n,3,D]. One clip at a time, so that a clip's rows never depend on its neighbours, not by a bit."""
    rows = [linear(norm.linear, functional.silu(clip)) for clip in torch.split(temb, 1)]
    # [n,6D] is (shift, scale, gate) of video, then of text
    return torch.cat(rows).reshape(len(temb), 2, 3, -1).flip(1).flatten(0, 1)


def block_rows(block: CogVideoXBlock, temb: Tensor) -> Rows:
    """Both norms' rows for clips with the embeddings `temb` [n,T]."""
    return modulation_rows(block.norm1, temb), modulation_rows(block.norm2, temb)


def is_frozen(transformer: CogVideoXTransformer3DModel) -> bool:
    """Whether modulation is a function of the timestep alone: no adapter on the layers that make it."""
    makers = [transformer.time_embedding, transformer.ofs_embedding]
    makers += [norm.linear for block in transformer.transformer_blocks for norm in (block.norm1, block.norm2)]
    return not any(value.requires_grad for maker in makers if maker is not None for value in maker.parameters())


class ModulationTable:
    """The rows of every block by timestep, made when first asked for, by the arithmetic of `modulation_rows`."""

    def __init__(self, transformer: CogVideoXTransformer3DModel, device: torch.device) -> None:
        assert is_frozen(transformer), "modulation with adapters changes with every step"
        self._norms = [(block.norm1, block.norm2) for block in transformer.transformer_blocks]
        self._rows: dict[int, Tensor] = {}
        """Of all timesteps in the end: 3.1 GB of host memory for 1000 of a 5B."""
        for norm in (norm for pair in self._norms for norm in pair):
            for parameter in norm.linear.parameters():
                parameter.data = host_copy(parameter.data, device)

    def rows(self, temb: Tensor, timesteps: Sequence[int]) -> list[Rows]:
        """For each block, the rows of clips with these timesteps and embeddings [n,T], on the device of `temb`."""
        for index, timestep in enumerate(timesteps):
            if timestep not in self._rows:
                self._rows[timestep] = host_copy(self._make(temb[index : index + 1]), temb.device)
        clips = [self._rows[timestep].to(temb.device, non_blocking=True) for timestep in timesteps]
        joined = torch.cat(clips, dim=2)  # [blocks,2,2n,3,D]
        return [(first, second) for first, second in joined]

    @torch.no_grad()
    def _make(self, temb: Tensor) -> Tensor:
        """[1,T] -> [blocks,2,2,3,D]; one layer is on the device at a time."""
        return torch.stack([torch.stack([self._row(norm, temb) for norm in pair]) for pair in self._norms])

    @staticmethod
    def _row(norm: CogVideoXLayerNormZero, temb: Tensor) -> Tensor:
        values = list(norm.linear.parameters())
        hosts = [value.data for value in values]
        try:
            for value, host in zip(values, hosts, strict=True):
                value.data = host.to(temb.device, non_blocking=True)
            return modulation_rows(norm, temb)
        finally:
            for value, host in zip(values, hosts, strict=True):
                value.data = host

"""One transformer block over a pack; the arithmetic is that of diffusers' `CogVideoXBlock`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers.models.normalization import CogVideoXLayerNormZero
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor, nn
from torch.nn import functional

from train.transformer.attention import RotaryTable, rotate
from train.transformer.compiled import CompiledKernels
from train.transformer.lora_linear import linear

Attend = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]
"""Query, key and value [S,heads,head_dim] and the tokens of each clip -> attention's output [S,heads*head_dim]."""


@dataclass(frozen=True, slots=True)
class Pack:
    """The token sequence [text_1; video_1; text_2; ...] of n clips, as far as the blocks need to know it."""

    temb: Tensor
    """[n,T] embedded timestep (and ofs) of each clip."""
    part_lengths: list[int]
    """Tokens of text_1, video_1, text_2, ...: 2n numbers."""
    rotary: RotaryTable | None
    """RoPE table of the whole sequence; the identity on text rows."""
    kernels: CompiledKernels | None = None
    """Compiled row-wise functions; None computes them eagerly."""
    parts: Tensor | None = None
    """[S] int64 number of each token's part, for the compiled functions."""

    @property
    def clip_lengths(self) -> list[int]:
        """Tokens of each clip, text and video."""
        return [text + video for text, video in zip(self.part_lengths[::2], self.part_lengths[1::2], strict=True)]


Modulation = tuple[Tensor, Tensor]
"""Shift, scale and gate of each part [2n,3,D], for attention and for the feed-forward layers."""


def block_forward(
    block: CogVideoXBlock, hidden: Tensor, modulations: Modulation, pack: Pack, attend: Attend
) -> tuple[Tensor, Tensor]:
    """Return the hidden states [S,D] after attention and the feed-forward update [S,D].

    `add_gated` of the two with the second modulation is the block's output.
    """
    attention, feed_forward = block.attn1, block.ff.net
    modulation, feed_forward_modulation = modulations
    normed = modulate(block.norm1.norm, hidden, modulation, pack)
    query, key, value = (
        linear(layer, normed).view(len(normed), attention.heads, -1)
        for layer in (attention.to_q, attention.to_k, attention.to_v)
    )
    query, key = qk_norm_and_rope(attention.norm_q, query, pack), qk_norm_and_rope(attention.norm_k, key, pack)
    attended = attend(query, key, value, pack.clip_lengths)
    hidden = add_gated(hidden, linear(attention.to_out[0], attended), modulation, pack)

    normed = modulate(block.norm2.norm, hidden, feed_forward_modulation, pack)
    activated = feed_forward[0].gelu(linear(feed_forward[0].proj, normed))
    return hidden, linear(feed_forward[2], activated)


def block_modulation(block: CogVideoXBlock, pack: Pack) -> Modulation:
    """Return the block's two modulations for the clips of a pack."""
    return modulation_rows(block.norm1, pack.temb), modulation_rows(block.norm2, pack.temb)


def modulation_rows(norm: CogVideoXLayerNormZero, temb: Tensor) -> Tensor:
    """Return (shift, scale, gate) of each part [2n,3,D], in the order text_1, video_1, text_2, ..., from temb [n,T].

    Each clip is computed alone, so that its rows never depend on its neighbors, not by a bit.
    """
    rows = [linear(norm.linear, functional.silu(clip)) for clip in torch.split(temb, 1)]
    # [n,6D] is (shift, scale, gate) of video, then of text
    return torch.cat(rows).reshape(len(temb), 2, 3, -1).flip(1).flatten(0, 1)


def modulate(norm: nn.LayerNorm, hidden: Tensor, modulation: Tensor, pack: Pack) -> Tensor:
    """Return `hidden` [S,D] normalized, then scaled and shifted by part."""
    if pack.kernels is not None:
        return pack.kernels.norm_and_modulate(hidden, norm.weight, norm.bias, norm.eps, modulation, pack.parts)
    shift, scale, _ = modulation.unbind(1)
    return scale_and_shift(norm(hidden), scale, shift, pack.part_lengths)


def scale_and_shift(tokens: Tensor, scale: Tensor, shift: Tensor, lengths: list[int]) -> Tensor:
    """Return tokens * (1 + scale) + shift on [S,D], row i of `scale` and `shift` for the i-th `lengths[i]` tokens."""
    parts = zip(torch.split(tokens, lengths), 1 + scale, shift, strict=True)
    return torch.cat([torch.addcmul(offset, part, factor) for part, factor, offset in parts])


def add_gated(hidden: Tensor, update: Tensor, modulation: Tensor, pack: Pack) -> Tensor:
    """Return hidden + gate * update on [S,D], with one gate [D] for each part."""
    if pack.kernels is not None:
        return pack.kernels.add_gated(hidden, update, modulation, pack.parts)
    splits = (torch.split(tokens, pack.part_lengths) for tokens in (hidden, update))
    return torch.cat([torch.addcmul(*part) for part in zip(*splits, modulation[:, 2], strict=True)])


def qk_norm_and_rope(norm: nn.LayerNorm, tokens: Tensor, pack: Pack) -> Tensor:
    """Return queries or keys [S,heads,head_dim], normalized per head and rotated to their positions."""
    if pack.kernels is not None:
        return pack.kernels.qk_norm_and_rope(tokens, norm.weight, norm.bias, norm.eps, pack.rotary)
    normed = norm(tokens)
    return normed if pack.rotary is None else rotate(normed, pack.rotary)

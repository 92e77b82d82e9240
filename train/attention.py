"""Attention over a pack: full inside a clip, none across. Tokens of one clip are neighbours, text before video."""

import torch
from torch import Tensor
from torch.nn import functional

RotaryTable = tuple[Tensor, Tensor]
"""cos and sin, [S,head_dim] each, fp32, every angle twice in a row."""


def rotate(tokens: Tensor, rotary: RotaryTable) -> Tensor:
    """Turn neighbouring channel pairs of `tokens` [S,heads,head_dim] by the angles of `rotary`, in fp32 or better.

    Source: diffusers `apply_rotary_emb` with `use_real_unbind_dim=-1`. A row with cos 1 and sin 0 is left as it is.
    """
    cos, sin = (table[:, None] for table in rotary)
    real, imaginary = tokens.reshape(*tokens.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    if tokens.dtype != torch.float64:
        return (tokens.float() * cos + turned.float() * sin).to(tokens.dtype)
    return tokens * cos + turned * sin


def attend(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """[S,heads,head_dim] three times -> [S,heads*head_dim]; `lengths` are the tokens of each clip and add up to S."""
    clips = zip(*(torch.split(part, lengths) for part in (query, key, value)), strict=True)
    return torch.cat([_attend_clip(*clip) for clip in clips])


def _attend_clip(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    # [S,heads,head_dim] -> [1,heads,S,head_dim], which is what the attention kernels want
    query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value)[0].transpose(0, 1).flatten(1)

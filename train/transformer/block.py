"""The parts of a transformer block over a pack; the arithmetic and its order are those of diffusers' `CogVideoXBlock`.

`checkpointing` puts them together: attention between `raw_qkv` and `add_attention`, then the feed-forward layers.
"""

from dataclasses import dataclass, replace

import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor, nn

from train.transformer.attention import RotaryTable, rotate
from train.transformer.compiled import Fused
from train.transformer.lora_linear import known_linear, linear, with_value


@dataclass(frozen=True, slots=True)
class Pack:
    """What the blocks need to know of the token sequence [text_1; video_1; text_2; ...] and of its n clips."""

    temb: Tensor
    """[n,T] embedded timestep (and ofs) of each clip."""
    part_lengths: list[int]
    """Tokens of text_1, video_1, text_2, ...: 2n numbers."""
    rotary: RotaryTable | None
    """Of the whole sequence; text rows turn by nothing."""
    fused: Fused | None = None
    """Compiled functions for the arithmetic of rows, which want to know every token's part."""
    part_of_token: Tensor | None = None
    """[S] int64, with `fused`."""

    @property
    def clip_lengths(self) -> list[int]:
        """Tokens of each clip, text and video."""
        return [text + video for text, video in zip(self.part_lengths[::2], self.part_lengths[1::2], strict=True)]

    def cut(self, start: int, stop: int) -> "Pack":
        """The tokens from `start` to `stop`; parts outside have length 0."""
        lengths, begin = [], 0
        for length in self.part_lengths:
            lengths.append(max(0, min(stop, begin + length) - max(start, begin)))
            begin += length
        rotary = None if self.rotary is None else (self.rotary[0][start:stop], self.rotary[1][start:stop])
        parts = None if self.part_of_token is None else self.part_of_token[start:stop]
        return replace(self, part_lengths=lengths, rotary=rotary, part_of_token=parts)

    def compiled(self, fused: Fused, device: torch.device) -> "Pack":
        """The same, whose rows are computed by `fused`."""
        return replace(self, fused=fused, part_of_token=fused.part_of_token(self.part_lengths, device))


def raw_qkv(block: CogVideoXBlock, hidden: Tensor, pack: Pack, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[S,D] -> query, key and value [S,D] as the linear layers give them."""
    normed = modulate(block.norm1.norm, hidden, rows, pack)
    attention = block.attn1
    return linear(attention.to_q, normed), linear(attention.to_k, normed), linear(attention.to_v, normed)


def known_qkv(
    block: CogVideoXBlock, hidden: Tensor, pack: Pack, rows: Tensor, raw_query: Tensor, raw_key: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`raw_qkv` for a backward pass: query and key known, the value's value not needed."""
    normed = modulate(block.norm1.norm, hidden, rows, pack)
    attention = block.attn1
    known = ((attention.to_q, raw_query), (attention.to_k, raw_key), (attention.to_v, None))
    query, key, value = (known_linear(layer, normed, values) for layer, values in known)
    return query, key, value


def normalize_and_turn(block: CogVideoXBlock, raw_query: Tensor, raw_key: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
    """[S,D] twice -> [S,heads,head_dim] twice, normalized per head and turned to their positions."""
    heads = ((block.attn1.norm_q, per_head(block, raw_query)), (block.attn1.norm_k, per_head(block, raw_key)))
    if pack.fused is not None:
        turn = pack.fused.normalize_and_turn
        query, key = (turn(tokens, norm.weight, norm.bias, norm.eps, pack.rotary) for norm, tokens in heads)
        return query, key
    query, key = (norm(tokens) for norm, tokens in heads)
    if pack.rotary is not None:
        query, key = rotate(query, pack.rotary), rotate(key, pack.rotary)
    return query, key


def per_head(block: CogVideoXBlock, tokens: Tensor) -> Tensor:
    """[S,D] -> [S,heads,head_dim]."""
    return tokens.view(len(tokens), block.attn1.heads, -1)


def add_attention(
    block: CogVideoXBlock, hidden: Tensor, attended: Tensor, pack: Pack, rows: Tensor, known: Tensor | None = None
) -> Tensor:
    """[S,D] with attention's update added. With `known`, its value for a backward pass, only the gradient is made."""
    layer = block.attn1.to_out[0]
    if known is None:
        return add_gated(hidden, linear(layer, attended), rows, pack)
    # only the gate's gradient reads the value of the layer
    update = linear(layer, attended) if rows.requires_grad else known_linear(layer, attended, None)
    return with_value(add_gated(hidden, update, rows, pack), known)


def widen(block: CogVideoXBlock, hidden: Tensor, pack: Pack, rows: Tensor, known: Tensor | None = None) -> Tensor:
    """[S,D] -> [S,4D], the first feed-forward layer before its activation; `known` as in `add_attention`."""
    normed = modulate(block.norm2.norm, hidden, rows, pack)
    layer = block.ff.net[0].proj
    return linear(layer, normed) if known is None else known_linear(layer, normed, known)


def add_feed_forward(
    block: CogVideoXBlock, hidden: Tensor, wide: Tensor, pack: Pack, rows: Tensor, *, backward: bool = False
) -> Tensor:
    """[S,D] with the feed-forward update added; with `backward` the value of the result is not needed."""
    activated, layer = block.ff.net[0].gelu(wide), block.ff.net[2]
    unread = backward and not rows.requires_grad
    update = known_linear(layer, activated, None) if unread else linear(layer, activated)
    return add_gated(hidden, update, rows, pack)


def modulate(norm: nn.LayerNorm, hidden: Tensor, rows: Tensor, pack: Pack) -> Tensor:
    """[S,D] normalized, then scaled and shifted by clip and kind of token."""
    if pack.fused is not None and pack.part_of_token is not None:
        fused = pack.fused.normalize_and_modulate
        return fused(hidden, norm.weight, norm.bias, norm.eps, rows, pack.part_of_token)
    shift, scale, _ = rows.unbind(1)
    return scale_and_shift(norm(hidden), scale, shift, pack.part_lengths)


def scale_and_shift(tokens: Tensor, scale: Tensor, shift: Tensor, lengths: list[int]) -> Tensor:
    """tokens * (1 + scale) + shift on [S,D], row i of `scale` and `shift` for the i-th run of `lengths` tokens."""
    runs = zip(torch.split(tokens, lengths), 1 + scale, shift, strict=True)
    return torch.cat([part * factor + offset for part, factor, offset in runs if len(part)])


def add_gated(hidden: Tensor, update: Tensor, rows: Tensor, pack: Pack) -> Tensor:
    """hidden + gate * update on [S,D], a gate [D] for each part."""
    if pack.fused is not None and pack.part_of_token is not None:
        return pack.fused.add_gated(hidden, update, rows, pack.part_of_token)
    runs = zip(torch.split(hidden, pack.part_lengths), torch.split(update, pack.part_lengths), rows[:, 2], strict=True)
    return torch.cat([part + gate * change for part, change, gate in runs if len(part)])

"""Positions of one clip's tokens: RoPE tables and additive embeddings, cached by shape because they never change.

Sizes are latent frames (padded), rows and columns, as the transformer gets them. Source: diffusers
`models/embeddings.py` and `_prepare_rotary_positional_embeddings` of the CogVideoX pipelines.
"""

from functools import lru_cache

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_sincos_pos_embed
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from torch import Tensor

from shared.model.conventions import Conventions
from shared.model.geometry import latent_frames
from train.transformer.attention import RotaryTable

Grid = tuple[int, int]


@lru_cache(maxsize=16)
@torch.inference_mode(mode=False)  # a table first made in an evaluation serves training, too
def image_rotary_emb(
    conventions: Conventions, frames: int, height: int, width: int, device: torch.device
) -> RotaryTable | None:
    """Return cos and sin [N,head_dim] in fp32 of a clip's N video tokens, or None for checkpoints without RoPE."""
    if conventions.positions == "sincos":
        return None
    p = conventions.patch_size
    grid = (height // p, width // p)
    base = (conventions.sample_height // p, conventions.sample_width // p)
    if conventions.positions == "rope_slice":
        assert conventions.patch_size_t is not None
        temporal_size = -(-frames // conventions.patch_size_t)
        cos, sin = get_3d_rotary_pos_embed(
            conventions.attention_head_dim, None, grid, temporal_size, grid_type="slice", max_size=base
        )
    else:
        cos, sin = get_3d_rotary_pos_embed(conventions.attention_head_dim, crop_region(grid, base), grid, frames)
    return cos.to(device), sin.to(device)


def crop_region(grid: Grid, base: Grid) -> tuple[Grid, Grid]:
    """Return top left and bottom right of `grid` (rows, columns) scaled to fit inside `base` and centered there.

    Source: diffusers `get_resize_crop_region_for_grid`, with its rounding.
    """
    rows, columns = grid
    base_rows, base_columns = base
    if rows / columns > base_rows / base_columns:
        fitted = (base_rows, round(base_rows / rows * columns))
    else:
        fitted = (round(base_columns / columns * rows), base_columns)
    top, left = (round((outer - inner) / 2.0) for outer, inner in zip(base, fitted, strict=True))
    return (top, left), (top + fitted[0], left + fitted[1])


def additive_positions(
    transformer: CogVideoXTransformer3DModel, conventions: Conventions, latents: Tensor, text_length: int
) -> Tensor | None:
    """Return [L+N,D] to add to L text tokens and the N video tokens of `latents` [F,C,H,W], in their dtype, or None.

    Sincos positions are zero on text; a learned table covers the text, too.
    """
    if conventions.positions not in ("sincos", "rope_crop_learned"):
        return None
    assert text_length == conventions.text_length, f"{text_length} text tokens, not {conventions.text_length}"
    frames, _, height, width = latents.shape
    if conventions.positions == "rope_crop_learned":
        table_frames = latent_frames(conventions.sample_frames)
        shape = (table_frames, conventions.sample_height, conventions.sample_width)
        assert (frames, height, width) == shape, f"the learned table is for latents {shape}"
        table: Tensor = transformer.patch_embed.pos_embedding[0]
        return table.to(latents.dtype)
    p = conventions.patch_size
    temporal, spatial = _sincos(
        conventions, transformer.patch_embed.embed_dim, frames, (height // p, width // p), latents.device
    )
    video = torch.cat([temporal.expand(-1, spatial.shape[1], -1), spatial.expand(frames, -1, -1)], dim=-1).flatten(0, 1)
    return torch.cat([video.new_zeros(text_length, video.shape[1]), video]).to(latents.dtype)


@lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def _sincos(
    conventions: Conventions, width: int, frames: int, grid: Grid, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the temporal quarter [F,1,D/4] and the spatial rest [1,rows*columns,3D/4] in fp32."""
    rows, columns = grid
    scales = (conventions.spatial_interpolation_scale, conventions.temporal_interpolation_scale)
    temporal = get_3d_sincos_pos_embed(width, (1, 1), frames, *scales)[..., : width // 4]
    spatial = get_3d_sincos_pos_embed(width, (columns, rows), 1, *scales)[..., width // 4 :]
    return temporal.contiguous().to(device), spatial.contiguous().to(device)


def forget_tables() -> None:
    """Drop the cached tables."""
    image_rotary_emb.cache_clear()
    _sincos.cache_clear()

"""CogVideoX's transformer over packs: clips of any shapes as one token sequence, on diffusers' modules and peft's LoRA.

Linear layers run on all tokens at once; attention, positions, timestep and modulation are per clip. The arithmetic is
that of diffusers' `CogVideoXTransformer3DModel.forward`. The model's own
dropout (0 in every checkpoint) is left out; the adapters' dropout acts. There is no autocast: activations have the
dtype of the clips.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from torch import Tensor
from torch.nn import functional

from shared.model.conventions import Conventions
from train.data.example import ModelInput
from train.transformer.attention import RotaryTable
from train.transformer.block import Pack, scale_and_shift
from train.transformer.checkpointing import run_block
from train.transformer.engine import EVERYTHING_RESIDENT, Engine
from train.transformer.lora_linear import linear
from train.transformer.positions import additive_positions, image_rotary_emb


def predict(
    transformer: CogVideoXTransformer3DModel,
    clips: Sequence[ModelInput],
    conventions: Conventions,
    engine: Engine = EVERYTHING_RESIDENT,
) -> list[Tensor]:
    """Return the velocity [F,C,H,W] of each clip, C without the image condition, in the dtype of the clips."""
    hidden, pack = embed(transformer, clips, conventions)
    if engine.kernels is not None:
        lengths = torch.tensor(pack.part_lengths)
        parts = torch.arange(len(lengths)).repeat_interleave(lengths).to(hidden.device, non_blocking=True)
        pack = replace(pack, kernels=engine.kernels, parts=parts)
    for index, block in enumerate(transformer.transformer_blocks):
        hidden = run_block(block, hidden, pack, engine, index)
    tokens = read_out(transformer, hidden, pack)
    videos = torch.split(tokens, pack.part_lengths[1::2])
    return [unpatchify(video, clip.latents, conventions) for video, clip in zip(videos, clips, strict=True)]


def embed(
    transformer: CogVideoXTransformer3DModel, clips: Sequence[ModelInput], conventions: Conventions
) -> tuple[Tensor, Pack]:
    """Return the token sequence [S,D] of all clips with their additive positions, and its pack."""
    texts = linear(transformer.patch_embed.text_proj, torch.cat([clip.prompt_embeds for clip in clips]))
    texts_of_clips = torch.split(texts, [len(clip.prompt_embeds) for clip in clips])
    tokens: list[Tensor] = []
    lengths: list[int] = []
    for clip, text in zip(clips, texts_of_clips, strict=True):
        video = patchify(transformer, clip.latents, conventions)
        joint = torch.cat([text, video])
        positions = additive_positions(transformer, conventions, clip.latents, len(text))
        tokens.append(joint if positions is None else joint + positions)
        lengths += [len(text), len(video)]
    temb = embed_timesteps(transformer, clips, conventions)
    return torch.cat(tokens), Pack(temb, lengths, _rotary(clips, conventions))


def embed_timesteps(
    transformer: CogVideoXTransformer3DModel, clips: Sequence[ModelInput], conventions: Conventions
) -> Tensor:
    """Return the sum [n,T] of the timestep's and the ofs embedding."""
    dtype = clips[0].latents.dtype
    timesteps = torch.stack([clip.timestep for clip in clips])
    temb: Tensor = transformer.time_embedding(transformer.time_proj(timesteps).to(dtype))
    if conventions.ofs is None:
        return temb
    ofs = torch.full((1,), conventions.ofs, dtype=dtype, device=temb.device)
    embedded: Tensor = transformer.ofs_embedding(transformer.ofs_proj(ofs).to(dtype))
    return temb + embedded


def patchify(transformer: CogVideoXTransformer3DModel, latents: Tensor, conventions: Conventions) -> Tensor:
    """Return the tokens [N,D] of latents [F,C,H,W], frames outermost."""
    project = transformer.patch_embed.proj
    if conventions.patch_size_t is None:
        patches: Tensor = project(latents)  # a convolution: [F,D,rows,columns]
        return patches.flatten(2).transpose(1, 2).flatten(0, 1)
    p, p_t = conventions.patch_size, conventions.patch_size_t
    frames, channels, height, width = latents.shape
    patches = latents.reshape(frames // p_t, p_t, channels, height // p, p, width // p, p)
    return linear(project, patches.permute(0, 3, 5, 2, 1, 4, 6).flatten(3).flatten(0, 2))


def unpatchify(tokens: Tensor, latents: Tensor, conventions: Conventions) -> Tensor:
    """Return [F,C,H,W], with F, H, W of `latents`, from tokens [N,C*p_t*p*p]."""
    frames, _, height, width = latents.shape
    p, p_t = conventions.patch_size, conventions.patch_size_t or 1
    patches = tokens.reshape(frames // p_t, height // p, width // p, -1, p_t, p, p)
    return patches.permute(0, 4, 3, 1, 5, 2, 6).reshape(frames, -1, height, width)


def read_out(transformer: CogVideoXTransformer3DModel, hidden: Tensor, pack: Pack) -> Tensor:
    """Return the projected video tokens [N,C*p_t*p*p] of all clips; the text tokens are not needed any more."""
    video = torch.cat(torch.split(hidden, pack.part_lengths)[1::2])
    norm = transformer.norm_out
    shift, scale = linear(norm.linear, functional.silu(pack.temb)).chunk(2, dim=1)
    normed = scale_and_shift(norm.norm(transformer.norm_final(video)), scale, shift, pack.part_lengths[1::2])
    return linear(transformer.proj_out, normed)


def _rotary(clips: Sequence[ModelInput], conventions: Conventions) -> RotaryTable | None:
    """Return cos and sin [S,head_dim] of the whole sequence: the identity on text, each clip's own table on video."""
    if conventions.positions == "sincos":
        return None
    cosines: list[Tensor] = []
    sines: list[Tensor] = []
    for clip in clips:
        frames, _, height, width = clip.latents.shape
        table = image_rotary_emb(conventions, frames, height, width, clip.latents.device)
        assert table is not None
        cos, sin = table
        cosines += [cos.new_ones(len(clip.prompt_embeds), cos.shape[1]), cos]
        sines += [sin.new_zeros(len(clip.prompt_embeds), sin.shape[1]), sin]
    return torch.cat(cosines), torch.cat(sines)

"""CogVideoX's transformer over packs: clips of any shapes as one token sequence, on diffusers' modules and peft's LoRA.

Linear layers run on all tokens at once; attention, positions, timestep and modulation are per clip. The arithmetic and
its order are those of diffusers' `CogVideoXTransformer3DModel.forward`, which `predict_reference` runs unchanged. The
model's own dropout (0 in every checkpoint) is left out; the adapters' dropout acts. There is no autocast: activations
have the dtype of the clips.
"""

from collections.abc import Sequence

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
from train.transformer.modulation import block_rows
from train.transformer.positions import additive_positions, image_rotary_emb


def predict(
    transformer: CogVideoXTransformer3DModel,
    clips: Sequence[ModelInput],
    conventions: Conventions,
    engine: Engine = EVERYTHING_RESIDENT,
) -> list[Tensor]:
    """The velocity [F,C,H,W] of each clip, C without the image condition, in the dtype of the clips."""
    hidden, pack = embed(transformer, clips, conventions)
    tabled = None
    if engine.modulation is not None:
        tabled = engine.modulation.rows(pack.temb, [_number(clip.timestep) for clip in clips])
    for index, block in enumerate(transformer.transformer_blocks):
        rows = tabled[index] if tabled is not None else block_rows(block, pack.temb)
        hidden = run_block(block, hidden, pack, rows, engine, index)
    tokens = read_out(transformer, hidden, pack)
    lengths = pack.part_lengths[1::2]
    return [
        unpatchify(part, clip.latents, conventions)
        for part, clip in zip(torch.split(tokens, lengths), clips, strict=True)
    ]


def predict_reference(
    transformer: CogVideoXTransformer3DModel, clips: Sequence[ModelInput], conventions: Conventions
) -> list[Tensor]:
    """The same by diffusers' own forward, one clip at a time."""
    learned = transformer.patch_embed.use_learned_positional_embeddings
    assert learned == (conventions.positions == "rope_crop_learned"), "positions of model and conventions differ"
    velocities = []
    for clip in clips:
        frames, _, height, width = clip.latents.shape
        (velocity,) = transformer(
            hidden_states=clip.latents[None],
            encoder_hidden_states=clip.prompt_embeds[None],
            timestep=clip.timestep[None],
            ofs=None if conventions.ofs is None else clip.latents.new_full((1,), conventions.ofs),
            image_rotary_emb=image_rotary_emb(conventions, frames, height, width, clip.latents.device),
            return_dict=False,
        )
        velocities.append(velocity[0])
    return velocities


def embed(
    transformer: CogVideoXTransformer3DModel, clips: Sequence[ModelInput], conventions: Conventions
) -> tuple[Tensor, Pack]:
    """The token sequence [S,D] of all clips with their additive positions, and the pack that describes it."""
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
    """[n,T], the sum of the timestep's and the ofs embedding."""
    dtype = clips[0].latents.dtype
    timesteps = torch.stack([clip.timestep for clip in clips])
    temb: Tensor = transformer.time_embedding(transformer.time_proj(timesteps).to(dtype))
    if conventions.ofs is None:
        return temb
    ofs = torch.full((1,), conventions.ofs, dtype=dtype, device=temb.device)
    embedded: Tensor = transformer.ofs_embedding(transformer.ofs_proj(ofs).to(dtype))
    return temb + embedded


def patchify(transformer: CogVideoXTransformer3DModel, latents: Tensor, conventions: Conventions) -> Tensor:
    """[F,C,H,W] -> [video tokens,D], frames outermost."""
    project = transformer.patch_embed.proj
    if conventions.patch_size_t is None:
        patches: Tensor = project(latents)  # a convolution: [F,D,rows,columns]
        return patches.flatten(2).transpose(1, 2).flatten(0, 1)
    p, p_t = conventions.patch_size, conventions.patch_size_t
    frames, channels, height, width = latents.shape
    patches = latents.reshape(frames // p_t, p_t, channels, height // p, p, width // p, p)
    return linear(project, patches.permute(0, 3, 5, 2, 1, 4, 6).flatten(3).flatten(0, 2))


def unpatchify(tokens: Tensor, latents: Tensor, conventions: Conventions) -> Tensor:
    """[video tokens, C*p_t*p*p] -> [F,C,H,W] with F, H, W of `latents`."""
    frames, _, height, width = latents.shape
    p, p_t = conventions.patch_size, conventions.patch_size_t or 1
    patches = tokens.reshape(frames // p_t, height // p, width // p, -1, p_t, p, p)
    return patches.permute(0, 4, 3, 1, 5, 2, 6).reshape(frames, -1, height, width)


def read_out(transformer: CogVideoXTransformer3DModel, hidden: Tensor, pack: Pack) -> Tensor:
    """[S,D] -> [video tokens of all clips, C*p_t*p*p]: final norms and projection; text has done its work."""
    video = torch.cat(torch.split(hidden, pack.part_lengths)[1::2])
    norm = transformer.norm_out
    shift, scale = linear(norm.linear, functional.silu(pack.temb)).chunk(2, dim=1)
    normed = scale_and_shift(norm.norm(transformer.norm_final(video)), scale, shift, pack.part_lengths[1::2])
    return linear(transformer.proj_out, normed)


def _rotary(clips: Sequence[ModelInput], conventions: Conventions) -> RotaryTable | None:
    """cos and sin [S,head_dim] of the whole sequence: nothing to turn on text, the clip's own table on video."""
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


def _number(timestep: Tensor) -> int:
    """On the meta device, where nothing has a value, every timestep is the same."""
    return 0 if timestep.device.type == "meta" else int(timestep)

"""CogVideoX's transformer over packs: clips of any shapes as one token sequence, on diffusers' modules and peft's LoRA.

Linear layers run on all tokens at once; attention, positions, timestep and modulation are per clip. The arithmetic and
its order are those of diffusers' `CogVideoXTransformer3DModel.forward`, which `predict_reference` runs unchanged. The
model's own dropout (0 in every checkpoint) is left out; the adapters' dropout acts. There is no autocast: activations
have the dtype of the clips.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.models.normalization import CogVideoXLayerNormZero
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock, CogVideoXTransformer3DModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from shared.variants import Conventions
from train.attention import RotaryTable, attend, rotate
from train.positions import additive_positions, image_rotary_emb


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One clip at the transformer's door, everything on its device."""

    latents: Tensor
    """[F,C,H,W] noisy latents in the model's dtype, padded in front; in I2V the image condition follows on channels."""
    prompt_embeds: Tensor
    """[L,D] in the model's dtype."""
    timestep: Tensor
    """[] int64."""


@dataclass(frozen=True, slots=True)
class Pack:
    """What the blocks need to know of the token sequence [text_1; video_1; text_2; ...] and of its n clips."""

    temb: Tensor
    """[n,T] embedded timestep (and ofs) of each clip."""
    part_lengths: list[int]
    """Tokens of text_1, video_1, text_2, ...: 2n numbers."""
    rotary: RotaryTable | None
    """Of the whole sequence; text rows turn by nothing."""

    @property
    def clip_lengths(self) -> list[int]:
        """Tokens of each clip, text and video."""
        return [text + video for text, video in zip(self.part_lengths[::2], self.part_lengths[1::2], strict=True)]


def predict(
    transformer: CogVideoXTransformer3DModel,
    clips: Sequence[ModelInput],
    conventions: Conventions,
    *,
    gradient_checkpointing: bool = False,
) -> list[Tensor]:
    """The velocity [F,C,H,W] of each clip, C without the image condition, in the dtype of the clips.

    `gradient_checkpointing` keeps only each block's input for the backward pass.
    """
    hidden, pack = embed(transformer, clips, conventions)
    for block in transformer.transformer_blocks:
        if gradient_checkpointing and torch.is_grad_enabled():
            hidden = checkpoint(run_block, block, hidden, pack, use_reentrant=False)
        else:
            hidden = run_block(block, hidden, pack)
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


def run_block(block: CogVideoXBlock, hidden: Tensor, pack: Pack) -> Tensor:
    """[S,D] -> [S,D]: attention, then feed-forward, each normalised and modulated before and gated after."""
    normed, gates = modulate(block.norm1, hidden, pack)
    attended = attend(*qkv(block, normed, pack), pack.clip_lengths)
    hidden = add_gated(hidden, project(block, attended), gates, pack)
    normed, gates = modulate(block.norm2, hidden, pack)
    return add_gated(hidden, feed_forward(block, normed), gates, pack)


def modulate(norm: CogVideoXLayerNormZero, hidden: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
    """adaLN: [S,D] normalised, scaled and shifted by clip and kind of token, and the gates [2n,D] for afterwards."""
    modulation = linear(norm.linear, functional.silu(pack.temb))
    # [n,6D] is (shift, scale, gate) of video, then of text; made into rows in the order text_1, video_1, text_2, ...
    rows = modulation.reshape(len(pack.temb), 2, 3, -1).flip(1).flatten(0, 1)
    shift, scale, gate = rows.unbind(1)
    return scale_and_shift(norm.norm(hidden), scale, shift, pack.part_lengths), gate


def qkv(block: CogVideoXBlock, normed: Tensor, pack: Pack) -> tuple[Tensor, Tensor, Tensor]:
    """[S,D] -> query, key, value [S,heads,head_dim], query and key normalised and turned to their positions."""
    attention = block.attn1
    query, key, value = (
        linear(layer, normed).view(len(normed), attention.heads, -1)
        for layer in (attention.to_q, attention.to_k, attention.to_v)
    )
    query, key = attention.norm_q(query), attention.norm_k(key)
    if pack.rotary is not None:
        query, key = rotate(query, pack.rotary), rotate(key, pack.rotary)
    return query, key, value


def project(block: CogVideoXBlock, attended: Tensor) -> Tensor:
    """Attention's output layer, [S,D] -> [S,D]."""
    return linear(block.attn1.to_out[0], attended)


def feed_forward(block: CogVideoXBlock, normed: Tensor) -> Tensor:
    """[S,D] -> [S,D], each token by itself."""
    inner, outer = block.ff.net[0], block.ff.net[2]
    return linear(outer, inner.gelu(linear(inner.proj, normed)))


def read_out(transformer: CogVideoXTransformer3DModel, hidden: Tensor, pack: Pack) -> Tensor:
    """[S,D] -> [video tokens of all clips, C*p_t*p*p]: final norms and projection; text has done its work."""
    video = torch.cat(torch.split(hidden, pack.part_lengths)[1::2])
    norm = transformer.norm_out
    shift, scale = linear(norm.linear, functional.silu(pack.temb)).chunk(2, dim=1)
    normed = scale_and_shift(norm.norm(transformer.norm_final(video)), scale, shift, pack.part_lengths[1::2])
    return linear(transformer.proj_out, normed)


def scale_and_shift(tokens: Tensor, scale: Tensor, shift: Tensor, lengths: list[int]) -> Tensor:
    """tokens * (1 + scale) + shift on [S,D], row i of `scale` and `shift` for the i-th run of `lengths` tokens."""
    rows = zip(torch.split(tokens, lengths), 1 + scale, shift, strict=True)
    return torch.cat([part * factor + offset for part, factor, offset in rows])


def add_gated(hidden: Tensor, update: Tensor, gates: Tensor, pack: Pack) -> Tensor:
    """hidden + gate * update on [S,D], a gate [D] for each part."""
    rows = zip(torch.split(hidden, pack.part_lengths), torch.split(update, pack.part_lengths), gates, strict=True)
    return torch.cat([part + gate * change for part, change, gate in rows])


def linear(layer: LoraLinear, tokens: Tensor) -> Tensor:
    """A linear layer (torch's, or peft's around it) with its adapters, in the dtype of `tokens` [...,D].

    Plain LoRA computes with copies of the fp32 masters cast to that dtype; peft itself would cast `tokens` up instead.
    Everything else (DoRA, merged or disabled adapters, quantised bases) is peft's own forward.
    """
    if not _is_plain_lora(layer):
        result: Tensor = layer(tokens)
        return result
    result = layer.base_layer(tokens)
    for name in layer.active_adapters:
        if name in layer.lora_A:
            down, up = (weights[name].weight.to(tokens.dtype) for weights in (layer.lora_A, layer.lora_B))
            dropped = layer.lora_dropout[name](tokens)
            result = result + functional.linear(functional.linear(dropped, down), up) * layer.scaling[name]
    return result


def _is_plain_lora(layer: LoraLinear) -> bool:
    return (
        type(layer) is LoraLinear
        and not (layer.disable_adapters or layer.merged or layer.lora_variant)
        and not any(layer.lora_bias.values())
    )


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

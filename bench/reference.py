"""diffusers' own forward over clips, which the packed forward is compared with."""

from collections.abc import Sequence

from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from torch import Tensor

from shared.model.conventions import Conventions
from train.data.example import ModelInput
from train.transformer.positions import image_rotary_emb


def predict_reference(
    transformer: CogVideoXTransformer3DModel, clips: Sequence[ModelInput], conventions: Conventions
) -> list[Tensor]:
    """Return what `predict` returns, by diffusers' own forward, one clip at a time."""
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

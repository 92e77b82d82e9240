"""Tiny models of the real classes, configured like each of the five CogVideoX variants, with random weights.

Everything is a function of its arguments; the same seed gives the same bits. Published values that decide conventions
are kept, sizes are not. `save_pipeline` writes the hub's folder layout.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import sentencepiece
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from peft import LoraConfig
from torch import nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

VARIANTS = ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_LENGTH = 16
TEXT_WIDTH = 32

_SENTENCES = (
    "a grey rabbit yawns in the meadow",
    "a white bird glides over a calm sea",
    "two children fly a red kite at dusk",
    "slow motion shot of rain falling on a city street",
    "the camera pans across a forest of tall pines",
)


def transformer_config(variant: str, text_length: int = TEXT_LENGTH) -> dict[str, Any]:
    """Return a `transformer/config.json` like the published one; 1.5 keeps its 300x300 grid, 1.0 has 8x12 latents."""
    config: dict[str, Any] = {
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "num_layers": 2,
        "in_channels": 16,
        "out_channels": 16,
        "time_embed_dim": 48,
        "text_embed_dim": TEXT_WIDTH,
        "max_text_seq_length": text_length,
        "sample_height": 8,
        "sample_width": 12,
        "sample_frames": 9,
        "patch_size": 2,
        "patch_size_t": None,
        "patch_bias": True,
        "ofs_embed_dim": None,
        "use_rotary_positional_embeddings": False,
        "use_learned_positional_embeddings": False,
    }
    if variant != "2b":
        config["use_rotary_positional_embeddings"] = True
    if variant.endswith("i2v"):
        config["in_channels"] = 32
    if variant == "5b-i2v":
        config["use_learned_positional_embeddings"] = True
    if variant.startswith("1.5"):
        config |= {"patch_size_t": 2, "patch_bias": False, "sample_height": 300, "sample_width": 300}
        config |= {"sample_frames": 81, "ofs_embed_dim": 48 if variant.endswith("i2v") else None}
    return config


def vae_config(variant: str) -> dict[str, Any]:
    """Return a `vae/config.json` like the published one."""
    return {
        "block_out_channels": [8, 8, 8, 8],
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "latent_channels": 16,
        "temporal_compression_ratio": 4,
        "sample_height": 96,
        "sample_width": 160,
        "scaling_factor": 1.15258426 if variant == "2b" else 0.7,
        "invert_scale_latents": variant.startswith("1.5"),
    }


def scheduler_config(variant: str) -> dict[str, Any]:
    """Return a `scheduler_config.json` like the published one: DDIM for 2b, DPM for the others."""
    return {
        "_class_name": "CogVideoXDDIMScheduler" if variant == "2b" else "CogVideoXDPMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "set_alpha_to_one": True,
        "snr_shift_scale": 3.0 if variant == "2b" else 1.0,
        "timestep_spacing": "trailing",
    }


def build_transformer(
    variant: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    lora_rank: int | None = None,
    text_length: int = TEXT_LENGTH,
    **changes: Any,
) -> CogVideoXTransformer3DModel:
    """Build a frozen transformer, with a non-zero adapter if `lora_rank` is given; `changes` go over the config."""
    with _seeded(seed):
        transformer = CogVideoXTransformer3DModel(**(transformer_config(variant, text_length) | changes))
        _randomize(transformer)
    nn.Module.to(transformer.requires_grad_(False).eval(), dtype)
    if lora_rank is not None:
        add_lora(transformer, lora_rank, seed)
    return transformer


def add_lora(
    transformer: CogVideoXTransformer3DModel,
    lora_rank: int,
    seed: int = 0,
    target_modules: Sequence[str] = LORA_TARGETS,
    adapter_name: str = "default",
    **options: Any,
) -> None:
    """Add an adapter with non-zero fp32 masters (float64 on a float64 model); `options` go to `LoraConfig`."""
    with _seeded(seed + 1):
        options = {"lora_alpha": 2 * lora_rank} | options
        transformer.add_adapter(LoraConfig(r=lora_rank, target_modules=list(target_modules), **options), adapter_name)
        transformer.train(transformer.training)  # a new adapter's dropout would act in an eval model
        for name, parameter in transformer.named_parameters():
            if f".{adapter_name}" in name and "lora_" in name:
                if parameter.dtype != torch.float64:
                    parameter.data = parameter.data.float()
                if "magnitude" not in name:
                    nn.init.normal_(parameter, std=0.1)


def build_vae(variant: str, seed: int = 0) -> AutoencoderKLCogVideoX:
    """Build a frozen VAE."""
    with _seeded(seed + 2):
        return AutoencoderKLCogVideoX(**vae_config(variant)).requires_grad_(False).eval()


def build_scheduler(variant: str) -> CogVideoXDDIMScheduler | CogVideoXDPMScheduler:
    """Build the scheduler of a variant."""
    config = scheduler_config(variant)
    kind = CogVideoXDDIMScheduler if config["_class_name"] == "CogVideoXDDIMScheduler" else CogVideoXDPMScheduler
    return kind.from_config(config)


def build_text_encoder(seed: int = 0) -> T5EncoderModel:
    """Build a frozen T5 encoder."""
    config = T5Config(
        vocab_size=len(build_tokenizer()),
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    with _seeded(seed + 3):
        return T5EncoderModel(config).requires_grad_(False).eval()


@lru_cache
def build_tokenizer(text_length: int = TEXT_LENGTH) -> T5Tokenizer:
    """Build a tokenizer with T5's special ids (pad 0, end 1, unknown 2) and a vocabulary trained here."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES),
        model_writer=model,
        vocab_size=200,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    with TemporaryDirectory() as name:
        # Only `from_pretrained` on a folder reads spiece.model rightly; `vocab_file=` maps everything to unknown.
        Path(name, "spiece.model").write_bytes(model.getvalue())
        return T5Tokenizer.from_pretrained(name, model_max_length=text_length)


def build_pipeline(
    variant: str, seed: int = 0, text_length: int = TEXT_LENGTH
) -> CogVideoXPipeline | CogVideoXImageToVideoPipeline:
    """Build the whole pipeline in fp32."""
    kind = CogVideoXImageToVideoPipeline if variant.endswith("i2v") else CogVideoXPipeline
    pipeline = kind(
        tokenizer=build_tokenizer(text_length),
        text_encoder=build_text_encoder(seed),
        vae=build_vae(variant, seed),
        transformer=build_transformer(variant, seed=seed, text_length=text_length),
        scheduler=build_scheduler(variant),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(variant: str, folder: Path, seed: int = 0, text_length: int = TEXT_LENGTH) -> Path:
    """Write the whole pipeline to `folder` as safetensors and return it."""
    build_pipeline(variant, seed, text_length).save_pretrained(folder, safe_serialization=True)
    return folder


def _randomize(transformer: CogVideoXTransformer3DModel) -> None:
    """Draw random weights at a size where gates, shifts, norms and positions all matter."""
    for name, parameter in transformer.named_parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
        elif "norm" in name:
            nn.init.normal_(parameter, std=0.3)
    if transformer.config.use_learned_positional_embeddings:
        transformer.patch_embed.pos_embedding += 0.3 * torch.randn_like(transformer.patch_embed.pos_embedding)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside, and restore it after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield

"""Peak memory of each sampling mode at the published sizes, counted: `.venv/bin/python -m bench.sample_memory`.

Weights and live activations of diffusers' own classes are counted on the meta device; the CUDA context and the
allocator's reserve are not. `sample/memory.py` has the counts per token and per pixel as constants.
"""

import argparse
from typing import Any
from unittest.mock import patch

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from bench import record
from bench.models import PUBLISHED
from sample.memory import largest_layer, weight_bytes
from shared.model.geometry import Bucket, latent_shape, padding_frames, video_tokens
from train.memory.choice import GIB
from train.memory.simulation import META, Tally, flash_on_meta

BF16 = torch.bfloat16
VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 256, 512],
    "layers_per_block": 3,
    "latent_channels": 16,
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "sample_height": 480,
    "sample_width": 720,
}
"""`vae/config.json` of THUDM/CogVideoX-2b, as far as sizes go."""
T5 = T5Config(
    d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu", vocab_size=32128
)
"""Of T5 v1.1 XXL, the text encoder of every CogVideoX."""
CASES = (("2b", Bucket(49, 480, 720)), ("5b", Bucket(49, 480, 720)), ("1.5-5b", Bucket(81, 768, 1360)))


def transformer_sizes(variant: str, bucket: Bucket) -> dict[str, int]:
    """Return bytes of the transformer in bf16, of one block, of its largest layer, and of a guided step's activations.

    The step of a model with two blocks takes what one with all takes: no gradient is kept.
    """
    config = PUBLISHED[variant]
    with Tally() as tally, torch.no_grad():
        with META:
            model = CogVideoXTransformer3DModel.from_config(config | {"num_layers": 2})
            nn.Module.to(model.requires_grad_(False), BF16)
        _, frames, height, width = latent_shape(bucket)
        frames += padding_frames(frames, config.get("patch_size_t"))
        tokens = video_tokens(bucket, config["patch_size"], config.get("patch_size_t"))
        rotary = tuple(torch.empty(tokens, 64, device=META) for _ in range(2))
        latents = torch.empty(2, frames, config["in_channels"], height, width, dtype=BF16, device=META)
        text = torch.empty(2, config["max_text_seq_length"], config["text_embed_dim"], dtype=BF16, device=META)
        before = tally.peak_bytes = tally.num_bytes
        with patch("torch.nn.functional.scaled_dot_product_attention", attention):
            rotates = config["use_rotary_positional_embeddings"]
            model(latents, text, torch.zeros(2, device=META), image_rotary_emb=rotary if rotates else None)
        activations = tally.peak_bytes - before
    block = weight_bytes(model.transformer_blocks[0])
    weights = weight_bytes(model) + (config["num_layers"] - 2) * block
    quantized = sum(layer.weight.numel() for layer in model.transformer_blocks[0].modules() if type(layer) is nn.Linear)
    around = weights - config["num_layers"] * block
    return {
        "weights": weights,
        "block": block,
        "around": around,
        "layer": largest_layer(model),
        "activations": activations,
        "int8": weights - config["num_layers"] * quantized,
        "int8 block": block - quantized,
    }


def attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """Return attention's output as FlashAttention makes it, without a matrix of scores."""
    return flash_on_meta(query, key, value)


def decoder_sizes(bucket: Bucket, *, tiled: bool) -> dict[str, int]:
    """Return bytes of the VAE's decoder in bf16, of its largest layer, and of the activations of a decode."""
    with Tally() as tally, torch.no_grad():
        with META:
            vae = AutoencoderKLCogVideoX(**VAE)
            nn.Module.to(vae.requires_grad_(False), BF16)
        if tiled:
            vae.enable_tiling()
        latents = torch.empty(1, *latent_shape(bucket), dtype=BF16, device=META)
        before = tally.peak_bytes = tally.num_bytes
        vae.decode(latents)
        return {"weights": weight_bytes(vae), "layer": largest_layer(vae), "activations": tally.peak_bytes - before}


def text_sizes() -> dict[str, int]:
    """Return bytes of T5 in bf16, and of the activations of one prompt."""
    with Tally() as tally, torch.no_grad():
        with META:
            model = T5EncoderModel(T5)
            nn.Module.to(model.requires_grad_(False), BF16)
        before = tally.peak_bytes = tally.num_bytes
        model(torch.empty(1, 226, dtype=torch.int64, device=META))
        return {"weights": weight_bytes(model), "activations": tally.peak_bytes - before}


def count() -> list[dict[str, Any]]:
    """Return the GiB of every mode for each published model, with and without tiles, in bf16 and with int8 blocks."""
    rows, text = [], text_sizes()
    for variant, bucket in CASES:
        net = transformer_sizes(variant, bucket)
        for tiled in (False, True):
            vae = decoder_sizes(bucket, tiled=tiled)
            for storage, weights, block in (("bf16", "weights", "block"), ("int8", "int8", "int8 block")):
                peaks = {
                    "none": net[weights] + vae["weights"] + max(net["activations"], vae["activations"]),
                    "model_offload": max(net[weights] + net["activations"], vae["weights"] + vae["activations"]),
                    "group_offload": vae["weights"]
                    + max(net["around"] + 2 * net[block] + net["activations"], vae["activations"]),
                    "sequential_offload": max(net["layer"] + net["activations"], vae["layer"] + vae["activations"]),
                }
                case = {"model": variant, "clip": str(bucket), "tiles": tiled, "weights": storage}
                rows.append(case | {name: size / GIB for name, size in peaks.items()})
    rows.append({"model": "T5, alone", "none": (text["weights"] + text["activations"]) / GIB})
    return rows


def main() -> None:
    """Count, write the results and print them."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = count()
    names = list(rows[0])
    text = "Peak GiB of `precog sample`, simulated:\n\n" + record.table(
        names, [[row.get(name, "") for name in names] for row in rows]
    )
    record.write("sample-memory", {"circumstances": record.circumstances(), "simulated_gib": rows}, text)
    print(text)


if __name__ == "__main__":
    main()

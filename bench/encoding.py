"""The two passes of stage 1 alone, with encoders of the published or a tiny size and random weights."""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX
from transformers import T5Config, T5EncoderModel

from bench.media import write_corpus
from precompute.discover import open_stage, survey
from precompute.estimate import find_work
from precompute.latents import encode_latents
from precompute.prompts import encode_prompts
from precompute.report import PassResult, Report
from shared.config import Config
from shared.fingerprint import sha256_file
from shared.media.pool import decode_pool
from shared.model.geometry import Bucket

ROOT = Path(__file__).parents[1]
VAE: dict[str, Any] = {
    "down_block_types": ["CogVideoXDownBlock3D"] * 4,
    "up_block_types": ["CogVideoXUpBlock3D"] * 4,
    "block_out_channels": [128, 256, 256, 512],
    "layers_per_block": 3,
    "latent_channels": 16,
    "temporal_compression_ratio": 4,
    "sample_height": 480,
    "sample_width": 720,
    "scaling_factor": 0.7,
}
"""`vae/config.json` of THUDM/CogVideoX-5b, the fields that decide its cost."""
T5: dict[str, Any] = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
"""T5 v1.1 XXL."""
TINY_VAE = VAE | {"block_out_channels": [8, 8, 8, 16], "layers_per_block": 1, "norm_num_groups": 2}
TINY_T5 = T5 | {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}


@dataclass(frozen=True, slots=True)
class Scene:
    """Inputs that all arms share."""

    pipeline: Path
    clips: Path
    warm_up: Path | None
    bucket: Bucket
    device: torch.device


def published_scene(folder: Path, clips: int) -> Scene:
    """Build the inputs on the GPU, at the size that the 5B is trained at."""
    device, bucket = torch.device("cuda"), Bucket(49, 480, 720)
    save_encoders(folder / "pipeline", VAE, T5, device)
    return Scene(
        folder / "pipeline", write_clips(folder, clips, bucket), write_clips(folder, 2, bucket), bucket, device
    )


def tiny_scene(folder: Path) -> Scene:
    """Build the inputs on the CPU, without a warm-up."""
    device, bucket = torch.device("cpu"), Bucket(9, 64, 96)
    save_encoders(folder / "pipeline", TINY_VAE, TINY_T5, device)
    return Scene(folder / "pipeline", write_clips(folder, 2, bucket), None, bucket, device)


def write_clips(folder: Path, count: int, bucket: Bucket) -> Path:
    """Write moving pictures of the bucket's size."""
    clips = folder / f"{count} clips"
    write_corpus(clips, count, bucket.height, bucket.width, bucket.frames)
    return clips


def save_encoders(folder: Path, vae: dict[str, Any], t5: dict[str, Any], device: torch.device) -> None:
    """Write the demo pipeline's layout with these encoders in bf16, linked by hash as in the hub's cache."""
    shutil.copytree(ROOT / "demo" / "mini", folder, ignore=shutil.ignore_patterns("vae", "text_encoder"))
    with device:
        AutoencoderKLCogVideoX(**vae).to(torch.bfloat16).save_pretrained(folder / "vae")
        T5EncoderModel(T5Config(**t5)).to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    for file in folder.glob("*/*.safetensors"):  # or each arm would read 9.5 GB again to hash them
        blob = folder / sha256_file(file)
        file.rename(blob)
        file.symlink_to(blob)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"text_embed_dim": t5["d_model"]}))


def config_for(scene: Scene, clips: Path, cache: Path, settings: dict[str, Any]) -> Config:
    """Return the config of clips of the scene's bucket; `settings` go over the [precompute] table."""
    return Config.model_validate(
        {
            "model": {"pretrained_model_name_or_path": str(scene.pipeline)},
            "data": {
                "name": "bench",
                "instance_data_root": clips,
                "caption_column": "prompts.txt",
                "video_column": "videos.txt",
                "fps": 0,
                "frame_buckets": [scene.bucket.frames],
                "allow_uneven_frame_buckets": True,
                "resolution_buckets": [[scene.bucket.height, scene.bucket.width]],
                "validation_prompts": [f"{number}: {'a rabbit yawns ' * 30}" for number in range(64)],
            },
            "precompute": {
                "cache": str(cache),
                "device": scene.device.type,
                "decode_workers": 8 if scene.device.type == "cuda" else 1,
                "clips_per_shard": 8,
                **settings,
            },
            "train": {"output_dir": "runs/bench"},
        }
    )


def one_pass(scene: Scene, clips: Path, kind: str, settings: dict[str, Any]) -> PassResult:
    """Run the pass over "clips" or "prompts" into a temporary cache."""
    with tempfile.TemporaryDirectory() as cache:
        config = config_for(scene, clips, Path(cache), settings)
        stage = open_stage(config)
        with decode_pool(config.precompute) as pool:
            wanted = survey(stage, pool)
            latents, prompts = find_work(stage, wanted)
            if kind == "clips":
                return encode_latents(stage, latents, wanted.by_key, pool)
            return encode_prompts(stage, prompts, wanted.texts)


def measure(scene: Scene, kind: str, settings: dict[str, Any]) -> dict[str, float]:
    """Time one pass after its warm-up, with fields of [precompute]."""
    if scene.warm_up is not None:
        one_pass(scene, scene.warm_up, kind, settings)
    if scene.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    result = one_pass(scene, scene.clips, kind, settings)
    report = Report(latents=result.samples, prompts=result.samples, seconds=result.seconds)
    found = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30 if scene.device.type == "cuda" else 0.0}
    if kind == "prompts":
        seconds = report.seconds["encode_prompts"]
        return found | {"prompts": report.prompts.made, "prompts_per_second": report.prompts.made / seconds}
    return found | {
        "clips": report.latents.made,
        "clips_per_second": report.clips_per_second,
        "waited_for_decode": report.waited_share("decode"),
        "waited_for_write": report.waited_share("write"),
    }

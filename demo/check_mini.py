"""Measure the miniature with the oracle of render.py: VAE, base, and a LoRA that teaches the concept.

Each figure of demo/mini/README.md comes from here: `.venv/bin/python demo/check_mini.py vae|base|lora`.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import CogVideoXPipeline
from peft import LoraConfig
from PIL import Image
from torch import Tensor

try:
    from demo import render, train_mini
except ImportError:  # run as a script: this folder is on the path, its parent is not
    import render  # type: ignore[no-redef]
    import train_mini  # type: ignore[no-redef]

PARTS = ("ground", "color", "motion", "shape")
UNSEEN_CLIPS = 200
CONCEPT_SAMPLES = 24


def load(folder: Path) -> CogVideoXPipeline:
    """Return the miniature in fp32 on the CPU."""
    pipeline = CogVideoXPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def share_right(expected: Sequence[render.Scene], read: Sequence[render.Scene]) -> dict[str, float]:
    """Return, for each part of a scene, the share of videos in percent from which the oracle reads it right."""
    pairs = list(zip(expected, read, strict=True))
    return {part: 100 * float(np.mean([getattr(a, part) == getattr(b, part) for a, b in pairs])) for part in PARTS}


def check_vae(pipeline: CogVideoXPipeline) -> dict[str, object]:
    """Measure reconstructions of unseen clips, in turn of every frame count and resolution, and the latents' spread."""
    vae, buckets = pipeline.vae, list(train_mini.BUCKETS)
    expected, read, errors, latents = [], [], [], []
    for index in range(UNSEEN_CLIPS):
        scene, video = train_mini.base_clip(buckets[index % len(buckets)], 10_000 + index, held_out=True)
        with torch.no_grad():
            posterior = vae.encode(video[None]).latent_dist
            decoded = vae.decode(posterior.mode()).sample[0]
        latents.append(posterior.sample(torch.Generator().manual_seed(index))[0].flatten(1) * vae.config.scaling_factor)
        errors.append(float(((decoded.clamp(-1, 1) - video) ** 2).mean()))
        expected.append(scene)
        read.append(render.read_scene(train_mini.to_pixels(decoded)))
    std = torch.cat(latents, dim=1).std(dim=1)
    return share_right(expected, read) | {
        "psnr": float(np.mean(10 * np.log10(4 / np.array(errors)))),
        "channel_std": [float(std.min()), float(std.max())],
    }


def make_videos(
    pipeline: CogVideoXPipeline,
    prompts: Sequence[str],
    bucket: train_mini.Bucket,
    guidance: float,
    steps: int,
    negative_prompt: str = "",
) -> list[render.Array]:
    """Return a video [F,H,W,3] in 0..255 per prompt; the noise of prompt i has seed i."""
    frames, height, width = bucket
    videos = []
    for first in range(0, len(prompts), 16):
        part = list(prompts[first : first + 16])
        result = pipeline(
            prompt=part,
            negative_prompt=[negative_prompt] * len(part),
            num_frames=frames,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=train_mini.TEXT_LENGTH,
            generator=[torch.Generator().manual_seed(first + i) for i in range(len(part))],
            output_type="np",
        ).frames
        videos += [video * 255 for video in result]
    return videos


def held_out_prompts(bucket: train_mini.Bucket) -> tuple[list[render.Scene], list[str]]:
    """Return the 64 scenes that the base has never seen and a caption of each."""
    rng = np.random.default_rng([6, *bucket])
    scenes = train_mini.SCENES[1]
    return scenes, [render.describe(scene, rng) for scene in scenes]


def check_base(
    pipeline: CogVideoXPipeline, bucket: train_mini.Bucket, guidance: float, steps: int, sheet: Path | None = None
) -> dict[str, float]:
    """Measure samples of the held-out prompts."""
    scenes, prompts = held_out_prompts(bucket)
    videos = make_videos(pipeline, prompts, bucket, guidance, steps)
    if sheet:
        write_sheet(sheet, videos[:16])
    return share_right(scenes, [render.read_scene(video) for video in videos])


def concept_latents(pipeline: CogVideoXPipeline) -> list[tuple[str, Tensor]]:
    """Return the concept's captions with the token and scaled moments [2,C,F,H,W]."""
    encoded = []
    for caption, video in render.concept_clips():
        with torch.no_grad():
            posterior = pipeline.vae.encode(train_mini.to_model(video)[None]).latent_dist
        moments = torch.cat([posterior.mean, posterior.std]) * pipeline.vae.config.scaling_factor
        encoded.append((f"{render.CONCEPT_TOKEN} {caption}", moments))
    return encoded


def train_lora(pipeline: CogVideoXPipeline, rank: int, steps: int, rate: float, batch: int = 8) -> list[float]:
    """Add a LoRA to the attention layers, train it on the concept's clips and return the loss of each step."""
    transformer = pipeline.transformer
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    parameters = [value for value in transformer.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    clips = concept_latents(pipeline)
    captions = [caption for caption, _ in clips]
    embeds = train_mini.encode_captions(captions, pipeline.tokenizer, pipeline.text_encoder)
    signal = pipeline.scheduler.alphas_cumprod.float()
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = train_mini.learning_rate(step, steps, rate, warm_up=10)
        rng = np.random.default_rng([7, step])
        generator = torch.Generator().manual_seed(step)
        timesteps = train_mini.spread_timesteps(batch, rng)
        total = 0.0
        by_shape: dict[tuple[int, ...], list[int]] = {}
        chosen = rng.permutation(len(clips))[:batch]
        for place, index in enumerate(chosen):
            by_shape.setdefault(tuple(clips[index][1].shape), []).append(place)
        for places in by_shape.values():
            rows = chosen[places]
            mean, std = torch.stack([clips[i][1] for i in rows]).unbind(1)
            latents = mean + std * torch.randn(mean.shape, generator=generator)
            noise = torch.randn(mean.shape, generator=generator)
            loss = train_mini.velocity_loss(transformer, signal, latents, noise, embeds[rows], timesteps[places])
            (loss.sum() / batch).backward()
            total += loss.sum().item() / batch
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def check_lora(
    pipeline: CogVideoXPipeline,
    rank: int,
    lora_steps: int,
    rate: float,
    guidance: float,
    steps: int,
    sheet: Path | None = None,
) -> dict[str, object]:
    """Measure the concept and the colors of other prompts before and after a LoRA."""
    bucket = (9, 64, 64)
    grounds = list(render.GROUNDS)
    prompts = [f"{render.CONCEPT_TOKEN} on {grounds[i % len(grounds)]}" for i in range(CONCEPT_SAMPLES)]
    before = make_videos(pipeline, prompts, bucket, guidance, steps)
    colors_before = check_base(pipeline, bucket, guidance, steps)
    started = time.process_time()
    losses = train_lora(pipeline, rank, lora_steps, rate)
    seconds = time.process_time() - started
    after = make_videos(pipeline, prompts, bucket, guidance, steps)
    colors_after = check_base(pipeline, bucket, guidance, steps)
    if sheet:
        write_sheet(sheet, [video for pair in zip(before[:8], after[:8], strict=True) for video in pair])
    return {
        "concept_before": 100 * float(np.mean([render.shows_concept(video) for video in before])),
        "concept_after": 100 * float(np.mean([render.shows_concept(video) for video in after])),
        "others_before": colors_before,
        "others_after": colors_after,
        "loss_first_20": float(np.mean(losses[:20])),
        "loss_last_20": float(np.mean(losses[-20:])),
        "train_cpu_seconds": seconds,
    }


def write_sheet(path: Path, videos: Sequence[render.Array]) -> None:
    """Write an image with one row of frames per video."""
    rows = [np.concatenate(list(video), axis=1) for video in videos]
    Image.fromarray(np.concatenate(rows).clip(0, 255).astype(np.uint8)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["vae", "base", "lora"])
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "mini")
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lora-steps", type=int, default=120)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--sheet", type=Path, help="image of the samples to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = load(options.model)
    figures: object
    if options.part == "vae":
        figures = check_vae(pipeline)
    elif options.part == "base":
        bucket = (options.frames, 64, options.width)
        figures = check_base(pipeline, bucket, options.guidance, options.steps, options.sheet)
    else:
        figures = check_lora(
            pipeline, options.rank, options.lora_steps, options.rate, options.guidance, options.steps, options.sheet
        )
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

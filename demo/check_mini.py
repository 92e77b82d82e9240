"""Measure the miniature with the oracle of render.py: VAE, base, and the LoRA of `make demo`.

Each figure of demo/mini/README.md comes from here: `.venv/bin/python demo/check_mini.py vae|base|lora`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import CogVideoXPipeline
from PIL import Image

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


def check_loras(
    pipeline: CogVideoXPipeline, adapters: Sequence[Path], guidance: float, steps: int, sheet: Path | None = None
) -> dict[str, dict[str, float]]:
    """Measure the concept, and color and motion of the held-out prompts, which lack the token, for each adapter."""
    bucket = (9, 64, 64)
    grounds, patterns = list(render.GROUNDS), render.CONCEPT_PATTERNS
    prompts = [patterns[i // 3 % len(patterns)].format(ground=grounds[i % 3]) for i in range(CONCEPT_SAMPLES)]
    figures, shown = {}, []
    for adapter in (None, *adapters):
        if adapter:
            pipeline.load_lora_weights(adapter)
        videos = make_videos(pipeline, prompts, bucket, guidance, steps)
        concept = 100 * float(np.mean([render.shows_concept(video) for video in videos]))
        figures[str(adapter or "base")] = {"concept": concept} | check_base(pipeline, bucket, guidance, steps)
        shown.append(videos[:2])
        if adapter:
            pipeline.unload_lora_weights()
    if sheet:
        write_sheet(sheet, [video for videos in zip(*shown, strict=True) for video in videos])
    return figures


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
    parser.add_argument("--adapters", type=Path, nargs="+", default=[Path("runs/demo/export")])
    parser.add_argument(
        "--sheet",
        type=Path,
        help="image to write: rows of frames; lora: two prompts, each without and with every adapter",
    )
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
        figures = check_loras(pipeline, options.adapters, options.guidance, options.steps, options.sheet)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

"""`precog sample`: videos from prompts with and without LoRAs, from the same noise; what is made already is kept."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers.utils.logging import disable_progress_bar
from PIL import Image, ImageOps

from sample.loras import Lora, find_loras, lines_that_load, load_lora, set_loras, warn_of_differences
from sample.pipeline import (
    VideoStart,
    checkpoint_conventions,
    load_pipeline,
    make_video,
    num_steps,
    put_on_device,
    uses_tiles,
)
from sample.prompts import embed_prompts, read_prompts
from sample.video import compare, read_input, read_mp4, thumbnails
from shared import console
from shared.atomic_files import replacing
from shared.config import Config
from shared.device import choose_device
from shared.errors import UsageError
from shared.fingerprint import Json, key_of, sha256_file
from shared.launcher import rank, world_size
from shared.model.conventions import Conventions
from shared.model.pretrained import pretrained_part
from shared.run_folder import SHEET
from shared.video import contact_sheet, write_mp4

NOT_IN_RECIPE = {"output_dir", "prompts", "prompts_file", "images", "video", "loras", "seed", "num_videos_per_prompt"}
NOT_IN_RECIPE |= {"device", "memory", "compile", "dtype", "enable_tiling", "strength"}
"""Fields of [sample] that change no pixel, or that a recipe holds in another form."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One video: a prompt and a seed with the base model or with LoRAs."""

    prompt: str
    seed: int
    start: VideoStart
    label: str
    loras: tuple[Lora, ...]
    video: Path
    base: Path
    """The base model's video of the same prompt and seed."""
    recipe: dict[str, Json]
    """Everything that shapes the video's pixels."""

    @property
    def record(self) -> Path:
        """The JSON file beside the video, written last."""
        return self.video.with_suffix(".json")

    @property
    def is_made(self) -> bool:
        """True if the video is there with this recipe."""
        try:
            return self.video.is_file() and json.loads(self.record.read_bytes())["recipe"] == self.recipe
        except (OSError, ValueError, KeyError, TypeError):
            return False


def sample(config: Config, *, grid: bool = False) -> dict[str, Json]:
    """Write an mp4 and a JSON per prompt, seed and column, and a contact sheet; return the object of `--json`.

    The columns are the base model and all LoRAs together, or in a grid each LoRA alone. Processes share the prompts.
    Raises `UsageError` if there are no prompts or a part of the model is missing.
    """
    prompts, loras = read_prompts(config), find_loras(config)
    device, conventions = choose_device(config.sample.device), checkpoint_conventions(config)
    starts = read_starts(config, conventions, len(prompts))
    sets = [(lora,) for lora in loras] if grid else [tuple(loras)]
    columns = [(" + ".join(lora.label for lora in each), each) for each in sets]
    if not grid and len({lora.name for lora in loras}) < len(loras):
        raise UsageError("sample.loras: a file is named twice; give one strength, or compare them with --grid")
    rows = cells(config, prompts, starts, [("base", ()), *columns], uses_tiles(config, device))
    config.sample.output_dir.mkdir(parents=True, exist_ok=True)
    missing = [cell for row in rows[rank() :: world_size()] for cell in row if not cell.is_made]
    if missing:
        make(config, conventions, missing, loras, device)
    if world_size() > 1:
        PartialState(cpu=device.type == "cpu").wait_for_everyone()
    every = [cell for row in rows for cell in row]
    if rank() == 0:
        labels = [" ".join(f"{cell.label}: {cell.prompt} (seed {cell.seed})".split()) for cell in every]
        image = contact_sheet([(label, thumbnails(cell.video)) for label, cell in zip(labels, every, strict=True)])
        with replacing(config.sample.output_dir / SHEET) as pending:
            image.save(pending, format="PNG")
    console.say("\n".join(str(cell.video) for cell in every))
    console.say(
        f"{len(missing)} made, {len(every) - len(missing)} were there already; {config.sample.output_dir / SHEET}"
    )
    console.say(f"`precog report grid {config.sample.output_dir}` writes a page with all videos of this folder")
    records = [json.loads(cell.record.read_bytes()) for cell in every]
    return {"videos": records, "made": len(missing), "sheet": str(config.sample.output_dir / SHEET)}


def read_starts(config: Config, conventions: Conventions, num_prompts: int) -> list[tuple[VideoStart, str | None]]:
    """Return the first frame or video of each prompt, and the sha256 of its file; raises `UsageError`."""
    settings, wanted = config.sample, num_prompts if conventions.image_to_video else 0
    if len(settings.images) != wanted:
        kind = "one per prompt" if wanted else "as the checkpoint is text-to-video"
        raise UsageError(f"sample.images: expected {wanted}, {kind}, got {len(settings.images)}; add or remove images")
    starts: list[tuple[VideoStart, str | None]] = []
    for path in settings.images:
        try:
            shown = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        except OSError as error:
            raise UsageError(f"sample.images: {path} is not a readable image ({error}); replace the file") from None
        starts.append((VideoStart(image=shown), sha256_file(path)))
    if settings.video is not None:
        frames = settings.num_frames // 8 * 8 if conventions.patch_size_t else settings.num_frames
        video = read_input(settings.video, frames, (settings.height, settings.width), settings.fps, config.precompute)
        return [(VideoStart(video=video), sha256_file(settings.video))] * num_prompts
    return starts or [(VideoStart(), None)] * num_prompts


def cells(
    config: Config,
    prompts: Sequence[str],
    starts: Sequence[tuple[VideoStart, str | None]],
    columns: Sequence[tuple[str, tuple[Lora, ...]]],
    tiled: bool,
) -> list[list[Cell]]:
    """Return a row for each prompt and seed, with a cell for each column."""
    settings = config.sample
    part = pretrained_part(config.model, "transformer")
    common: dict[str, Json] = {
        **settings.model_dump(mode="json", exclude=NOT_IN_RECIPE),
        "model": config.model.model_dump(mode="json", exclude={"model_cache_dir"}),
        "weights": key_of([list(mark) for mark in part.marks]),
        "dtype": part.precision(settings.dtype),
        "text_dtype": config.precompute.text_dtype,
        "negative_prompt": config.data.negative_prompt,
        "tiling": tiled,
        "strength": None if settings.video is None else settings.strength,
    }
    rows = []
    for number, (prompt, (start, sha256)) in enumerate(zip(prompts, starts, strict=True)):
        for seed in range(settings.seed, settings.seed + settings.num_videos_per_prompt):
            stem = f"{number:02}-{slug(prompt)}" + (f"-seed{seed}" if settings.num_videos_per_prompt > 1 else "")
            row = []
            for label, loras in columns:
                used: Json = [{"sha256": lora.sha256, "strength": lora.strength} for lora in loras]
                recipe = common | {"prompt": prompt, "seed": seed, "start": sha256, "loras": used}
                video, base = (settings.output_dir / f"{stem}-{slug(name)}.mp4" for name in (label, columns[0][0]))
                row.append(Cell(prompt, seed, start, label, loras, video, base, recipe))
            rows.append(row)
    return rows


def make(
    config: Config, conventions: Conventions, missing: Sequence[Cell], loras: Sequence[Lora], device: torch.device
) -> None:
    """Generate the cells' videos in their order, the base model's first, and write a record beside each."""
    guided, negative = config.sample.guidance_scale > 1, config.data.negative_prompt
    texts = [cell.prompt for cell in missing] + ([negative] if guided else [])
    embeds = embed_prompts(config, texts, conventions, device)
    disable_progress_bar()
    pipeline = load_pipeline(config, conventions, device)
    for lora in {lora.name: lora for lora in loras}.values():
        precision = str(pipeline.transformer.dtype).removeprefix("torch.")
        warn_of_differences(lora.file, load_lora(pipeline, lora), config, conventions, precision)
    put_on_device(pipeline, config, conventions, device)
    with console.Progress("denoising steps", len(missing) * num_steps(config)) as bar:
        for cell in missing:
            set_loras(pipeline, cell.loras)
            pair = embeds[cell.prompt], embeds[negative] if guided else None
            frames = make_video(config, pipeline, conventions, pair, cell.seed, cell.start, bar.advance)
            write_mp4(cell.video, frames, config.sample.fps)
            write_record(cell)


def write_record(cell: Cell) -> None:
    """Write the JSON beside a video: its recipe, its figures beside the base model's, and what loads its LoRAs."""
    body: dict[str, Any] = {
        "video": cell.video.name,
        "label": cell.label,
        "prompt": cell.prompt,
        "seed": cell.seed,
        **compare(read_mp4(cell.video), read_mp4(cell.base)),
        "load": lines_that_load(cell.loras),
        "recipe": cell.recipe,
    }
    with replacing(cell.record) as pending:
        pending.write_text(json.dumps(body, indent=1, ensure_ascii=False), "utf-8")


def slug(text: str) -> str:
    """Return the text as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "empty"

"""`precog init`: a folder of videos and a model to NAME.toml and NAME.jsonl.

Rank, learning rate and steps follow the training notes in diffusers' `examples/cogvideo/README.md`.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prepare.folder import look_into
from prepare.table import PrepareReport, Row, captions_of, lint_rows, read_rows, replace_text, write_rows
from prepare.videos import VideoSummary
from shared.caption_lint import with_trigger
from shared.cards import find_card
from shared.config_file import load_config
from shared.errors import DataError, UsageError
from shared.model.conventions import Conventions, read_conventions, refusal
from shared.model.geometry import MAX_CROPPED, MAX_UPSCALE, Bucket, choose_frames, choose_resolution, cropped_share

ASPECTS = (1.0, 4 / 3, 3 / 2, 16 / 9, 21 / 9)
"""Long side over short side of such buckets."""
ENOUGH_CLIPS = 25
RESERVE_GIB = 1.0
"""Memory of a card that CUDA and a desktop take."""

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoice:
    """The sizes and memory of a published checkpoint."""

    hub_name: str
    transformer: Mapping[str, Any] = field(default_factory=dict)
    """Entries of its config that decide which buckets can be trained."""
    fps: int = 8
    frames: Sequence[int] = range(9, 50, 8)
    """Frame buckets: 8k+1, for 1.5 also with whole pairs of latent frames."""
    size: Size = (480, 720)
    min_side: int = 16
    leanest_gib: float = 4.5
    """Training with all weights streamed and all activations recomputed, rank 64 (simulated)."""
    encode_gib: float = 6.2
    """The VAE's encoder on one clip of `size`, bf16, without tiling."""

    @property
    def conventions(self) -> Conventions:
        """The conventions of the published configs."""
        scheduler = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
        return read_conventions(self.transformer, {}, scheduler)


_ROPE: Mapping[str, Any] = {"use_rotary_positional_embeddings": True}
_I2V = {"in_channels": 32, "use_learned_positional_embeddings": True}
_1_5 = {"patch_size_t": 2, "sample_height": 300, "sample_width": 300, "sample_frames": 81}
_1_5_NEEDS: dict[str, Any] = {"fps": 16, "frames": range(17, 82, 16), "size": (768, 1360), "min_side": 768}
_1_5_NEEDS |= {"leanest_gib": 8.5, "encode_gib": 22.8}
MODELS = {
    "2b": ModelChoice(hub_name="zai-org/CogVideoX-2b", leanest_gib=2.6),
    "5b": ModelChoice(hub_name="zai-org/CogVideoX-5b", transformer={**_ROPE}),
    "5b-i2v": ModelChoice(hub_name="zai-org/CogVideoX-5b-I2V", transformer={**_ROPE, **_I2V}),
    "1.5-5b": ModelChoice(hub_name="zai-org/CogVideoX1.5-5B", transformer={**_ROPE, **_1_5}, **_1_5_NEEDS),
    "1.5-5b-i2v": ModelChoice(
        hub_name="zai-org/CogVideoX1.5-5B-I2V",
        transformer={**_ROPE, **_1_5, "in_channels": 32, "ofs_embed_dim": 512},
        **_1_5_NEEDS,
    ),
}


@dataclass(frozen=True, slots=True)
class Buckets:
    """The buckets that suit a folder's videos."""

    frames: tuple[int, ...]
    sizes: Mapping[str, Size]
    """Video -> height and width, for every video that can be used."""
    left_out: Mapping[str, str]
    """Video -> reason."""
    notes: tuple[str, ...]


def init_project(
    name: str, folder: Path, model: str, trigger: str = "", card: str = "", *, follow_links: bool = False
) -> PrepareReport:
    """Write NAME.toml, if there is none, and NAME.jsonl, to which videos without a row are added.

    Raises `UsageError` for a wrong argument, `DataError` if no video can be used; then nothing is written.
    """
    choice, gib = MODELS[model], find_card(card).gib if card else math.inf
    base, folder = Path(name.removesuffix(".toml")).expanduser(), folder.expanduser()
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", base.name):
        raise UsageError(f"NAME {base.name!r}: expected up to 64 letters, digits, _ or -")
    config_file, table = base.with_name(f"{base.name}.toml"), base.with_name(f"{base.name}.jsonl")
    contents = look_into(folder, follow_links=follow_links)
    buckets = choose_buckets(contents.videos, choice)
    left_out = dict(sorted({**contents.left_out, **buckets.left_out}.items()))
    if not buckets.sizes:
        shown = "; ".join(f"{file}: {reason}" for file, reason in list(left_out.items())[:5])
        raise DataError(f"--videos {folder}: no video can be used; {shown or 'the folder has no files'}")

    rows = read_rows(table) if table.exists() else []
    known = {row.get("video") for row in rows}
    leading = rf"^{re.escape(trigger.strip())}(\W+|$)" if trigger.strip() else "^"  # stage 1 puts the trigger back
    captions = {video: re.sub(leading, "", text) for video, text in contents.captions.items()}
    new = [{"video": video, "text": captions[video]} for video in buckets.sizes if video not in known]
    rows += new
    table.parent.mkdir(parents=True, exist_ok=True)
    if new:
        write_rows(table, rows)
    written = not config_file.exists()
    if written:
        text = config_text(base.name, folder, table, model, buckets, rows, trigger, gib)
        replace_text(config_file, text.replace("follow_links = false", f"follow_links = {_toml(follow_links)}"))
    notes = [*contents.notes, *buckets.notes]
    if gib - RESERVE_GIB < choice.leanest_gib:
        notes.append(f"--card: the leanest plan takes about {choice.leanest_gib:g} GiB, so the base is stored in int8")
    if not written:
        notes.append(f"{config_file} is kept as it is")
    without = [str(row.get("video")) for row in rows if not captions_of(row)]
    to_caption = f"precog caption {config_file}, or write captions into {table}"
    summary = {
        "usable videos": list(buckets.sizes),
        "new rows": [row["video"] for row in new],
        "rows without a caption": without,
        **{f"{h}x{w}": count for (h, w), count in sorted(Counter(buckets.sizes.values()).items())},
        "frames": ", ".join(map(str, buckets.frames)),
        "next": to_caption if without else f"precog precompute {config_file}",
    }
    findings = lint_rows(rows, load_config(config_file))
    return PrepareReport(
        config=str(config_file), table=str(table), summary=summary, files=left_out, notes=notes, findings=findings
    )


def choose_buckets(videos: Mapping[str, VideoSummary], choice: ModelChoice) -> Buckets:
    """Return frame and resolution buckets that the checkpoint can be trained at, for these lengths and shapes."""
    conventions = choice.conventions
    candidates = [frames for frames in choice.frames if refusal(conventions, Bucket(frames, *choice.size)) is None]
    sizes: dict[str, Size] = {}
    left_out: dict[str, str] = {}
    longest = 0
    for name, video in videos.items():
        size, available = _size_for(video, choice, conventions), video.frames_at(choice.fps)
        frames = choose_frames(available, candidates)
        if frames is None:
            left_out[name] = (
                f"too short: {available} frames at {choice.fps} fps, the smallest bucket is {candidates[0]}"
            )
        elif max(size[0] / video.height, size[1] / video.width) > MAX_UPSCALE:
            left_out[name] = f"too few pixels: {video.height}x{video.width} for {size[0]}x{size[1]}"
        else:
            sizes[name], longest = size, max(longest, frames)
    notes = []
    if cropped := [
        name
        for name, size in sizes.items()
        if cropped_share(videos[name].height, videos[name].width, size) > MAX_CROPPED
    ]:
        notes.append(f"{len(cropped)} videos lose over {MAX_CROPPED:.0%} of the picture to the crop, as {cropped[0]!r}")
    seconds = 2 * candidates[-1] / choice.fps
    if long := [name for name in sizes if videos[name].seconds > seconds]:
        notes.append(f"{len(long)} videos are over {seconds:.0f} s long, as {long[0]!r}; `precog split` finds scenes")
    if len(sizes) < ENOUGH_CLIPS:
        notes.append(f"{len(sizes)} videos; {ENOUGH_CLIPS} or more work best for a new concept or style")
    return Buckets(tuple(frames for frames in candidates if frames <= longest), sizes, left_out, tuple(notes))


def _size_for(video: VideoSummary, choice: ModelChoice, conventions: Conventions) -> Size:
    """Return the model's own size, upright or not, or one with about its sides where that would crop too much."""

    def trainable(size: Size) -> bool:
        return refusal(conventions, Bucket(choice.frames[-1], *size)) is None

    own = choose_resolution(video.height, video.width, list(filter(trainable, (choice.size, choice.size[::-1]))))
    ratio = max(video.height, video.width) / min(video.height, video.width)
    ratio = min(ASPECTS, key=lambda aspect: abs(math.log(aspect / ratio)))
    short, long = choice.size
    if ratio > long / short:
        short = round(long / ratio / 16) * 16
    else:
        long = round(short * ratio / 16) * 16
    fitted = (long, short) if video.height > video.width else (short, long)
    lost, less = (cropped_share(video.height, video.width, size) for size in (own, fitted))
    better = lost > MAX_CROPPED and less < lost
    return fitted if better and short >= choice.min_side and trainable(fitted) else own


CONFIG = """\
# Written by `precog init` for {model}; edit it freely. The clips are in {table_name}.
[model]
pretrained_model_name_or_path = {hub_name}

[data]
name = {name}
instance_data_root = {folder}
follow_links = false                 # true: also take links that lead out of that folder
dataset_name = {table}
id_token = {trigger}                      # put before every caption
# default_caption = "..."            # for rows without a caption; they are skipped without it
fps = {fps}
max_num_frames = {num_frames}
frame_buckets = {frames}
resolution_buckets = {sizes}    # height x width
validation_prompts = {prompts}
held_out_clips = {held_out}

[precompute]
cache = "cache"
enable_tiling = {tiled}              # true: the VAE takes less memory

[train]
output_dir = {run}
lora_rank = {rank}                     # 64 for what the model cannot do yet, 16 or 32 for what it nearly can
lora_alpha = {rank}
learning_rate = {rate}               # 1e-3 to 1e-4
lr_scheduler = "constant_with_warmup"
lr_warmup_steps = 100
max_train_steps = {steps}             # 1,500 to 4,000: about 40 times the number of clips
checkpointing_steps = 250
validation_steps = 250

[memory]
{memory}

[sample]
output_dir = {samples}
{sample_prompts}
num_frames = {num_frames}
height = {height}
width = {width}
fps = {fps}
"""
"""NAME.toml, with a comment where a person may choose otherwise."""


def config_text(
    name: str, folder: Path, table: Path, model: str, buckets: Buckets, rows: Sequence[Row], trigger: str, gib: float
) -> str:
    """Return the text of NAME.toml for `rows` and a card of `gib` GiB."""
    choice, clips = MODELS[model], len(rows)
    height, width = Counter(buckets.sizes.values()).most_common(1)[0][0]
    texts = list(dict.fromkeys(text for row in rows for text in captions_of(row) if text.isprintable()))
    prompts = [with_trigger(trigger, text) for text in texts[:: max(1, len(texts) // 2)][:2]]
    sample_prompts = f"prompts = {_toml(prompts)}"
    if model.endswith("i2v"):
        sample_prompts = f"# {sample_prompts}\n# images = [...]                   # a first frame for each prompt"
    small = gib - RESERVE_GIB < choice.leanest_gib
    return CONFIG.format(
        model=model,
        table_name=table.name,
        hub_name=_toml(choice.hub_name),
        name=_toml(name),
        folder=_toml(str(folder)),
        table=_toml(str(table)),
        trigger=_toml(trigger),
        fps=choice.fps,
        num_frames=max(buckets.frames),
        frames=_toml(buckets.frames),
        sizes=_toml(sorted(set(buckets.sizes.values()))),
        prompts=_toml(prompts),
        held_out=0 if clips < 5 else min(8, max(1, clips // 10)),
        tiled=_toml(gib - RESERVE_GIB < choice.encode_gib),
        run=_toml(f"runs/{name}"),
        rank=32 if gib <= 24 and model != "2b" else 64,
        rate="1e-3" if model == "2b" and clips >= ENOUGH_CLIPS else "1e-4",
        steps=min(4000, max(1500, 40 * clips)),
        memory='base_precision = "int8"             # the card is small' if small else '# "auto" suits the card',
        samples=_toml(f"runs/{name}/samples"),
        sample_prompts=sample_prompts,
        height=height,
        width=width,
    )


def _toml(value: object) -> str:
    """Return text, a truth value, numbers or lists of them as TOML, which is JSON for these."""
    return json.dumps(value, ensure_ascii=False)

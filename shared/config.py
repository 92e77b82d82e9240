"""One experiment is one TOML file: [model] [data] [precompute] [train] [sample], typed, overridable by dotted name.

Where the diffusers reference script has an option, the field keeps its name and meaning. Units stand in the names.
Relative paths are relative to the working directory. Secrets are never a field.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from shared.redaction import COMMIT, HAS_SECRET, SECRET

ShapedPart = Literal[
    "clips", "buckets", "view", "latents", "image_latents", "prompts", "run", "resolved_by_run", "preview", "nothing"
]


@dataclass(frozen=True, slots=True)
class Shapes:
    """The part of the results that a field's value shapes. Recipes, views and runs take their fields from it."""

    part: ShapedPart
    recipe_entry: str = ""
    """Dotted name of the recipe's entry that holds the value."""


CLIPS = Shapes("clips")
"""Frames and pixels of a clip: part of its key."""
BUCKETS = Shapes("buckets")
"""Acts through data.frame_buckets and data.resolution_buckets."""
VIEW = Shapes("view")
"""Choice of clips and captions of the view, without any clip's bytes."""
FIXED_BY_RUN = Shapes("run")
"""A resumed run must have the same value."""
RESOLVED_BY_RUN = Shapes("resolved_by_run")
"""A resumed run must have the same result of the value: a hash, a dtype, an order."""
IN_PREVIEW = Shapes("preview")
"""Written beside each preview."""
FREE = Shapes("nothing")
"""May change at any time: a place, an amount of work, something that is only shown."""

LORA_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")
Precision = Literal["auto", "fp32", "fp16", "bf16"]
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _multiple_of_16(size: int) -> int:
    if size % 16:
        raise ValueError(f"{size} is not a multiple of 16 (VAE factor 8 times patch size 2)")
    return size


def _not_a_secret(value: object) -> object:
    if SECRET.search(str(value)):
        raise ValueError(HAS_SECRET)
    return value


def _not_a_secret_or_commit(value: object) -> object:
    return value if re.fullmatch(COMMIT, str(value)) else _not_a_secret(value)


def _home_expanded(path: Path) -> Path:
    return Path(os.path.expanduser(path))  # noqa: PTH111 - the `~` of an unknown user stays


def _parts(value: object) -> object:
    """Return a text such as 9,17 or 64x96,96x64, or one number, as a list; an item such as 64x96 becomes a pair."""
    value = re.findall(r"[^\s,\[\]'\"]+", value) if isinstance(value, str) else value
    items = [value] if isinstance(value, int) else value
    if isinstance(items, list | tuple):
        return [i.lower().split("x") if isinstance(i, str) and re.fullmatch(r"\d+[xX]\d+", i) else i for i in items]
    return value


def _not_empty(value: object) -> object:
    if isinstance(value, str) and not value.strip():
        raise ValueError("should not be empty")
    return value


def _device_name(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9]\d?))?", name):
        raise ValueError("should be auto, cpu, cuda or a GPU's number as in cuda:1")
    return name


Side = Annotated[int, Field(gt=0), AfterValidator(_multiple_of_16)]
NotSecret = BeforeValidator(_not_a_secret)
Text = Annotated[str, NotSecret]
NotEmpty = BeforeValidator(_not_empty)
"""Also for paths: an empty one would be the working directory."""
Name = Annotated[Text, NotEmpty]
Place = Annotated[Path, NotEmpty, NotSecret, AfterValidator(_home_expanded)]
"""A leading `~` is the home folder."""
PlaceOrName = Annotated[Name, AfterValidator(os.path.expanduser)]
"""A path, whose leading `~` is the home folder, or a hub name or URL."""
Device = Annotated[str, AfterValidator(_device_name)]
Item = TypeVar("Item")
Parts = Annotated[tuple[Item, ...], Field(min_length=1), BeforeValidator(_parts)]
"""A list, also given as one value or as a text with commas."""
OneOrMore = Annotated[tuple[Item, ...], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""A list, also given as one text."""


class Table(BaseModel):
    """One table of the config; every field is annotated with what it shapes."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class Model(Table):
    pretrained_model_name_or_path: Annotated[PlaceOrName, FREE]
    """Hub name or local folder in the diffusers layout."""
    revision: Annotated[Annotated[str, NotEmpty, BeforeValidator(_not_a_secret_or_commit)] | None, FREE] = None
    """Commit, tag or branch on the hub, for every part."""
    variant: Annotated[Name | None, FREE] = None
    """File variant of the weights, such as "fp16"."""
    model_cache_dir: Annotated[Place | None, FREE] = None
    """Where hub downloads are kept; None is the hub's own default."""


class Data(Table):
    name: Annotated[Text, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$"), FREE]
    """The view's name in the cache."""
    instance_data_root: Annotated[Place, FREE]
    """Folder that every video path stays inside."""
    dataset_name: Annotated[PlaceOrName | None, FREE] = None
    """CSV, JSONL or parquet file, or folder or hub name for `datasets.load_dataset`; None reads text files."""
    dataset_config_name: Annotated[Name | None, FREE] = None
    """Configuration of the hub data set."""
    caption_column: Annotated[Name, VIEW] = "text"
    """Column of `dataset_name`, or without it a text file in the root with one caption per line."""
    video_column: Annotated[Name, VIEW] = "video"
    """Column of `dataset_name`, or without it a text file in the root with one video path per line."""
    id_token: Annotated[Text, VIEW] = ""
    """Put before every caption, with one space."""
    default_caption: Annotated[Text | None, VIEW] = None
    """Caption of the clips that have none, may be ""; without it such clips are skipped."""
    leave_out: Annotated[Place | None, FREE] = None
    """Text file with the key and source of each clip to leave out, as `precog report data` writes it."""
    follow_links: Annotated[bool, FREE] = False
    """Also take links that lead out of the data root, as in a hub cache, DVC or git-annex."""
    embedded_videos_gib: Annotated[float, Field(gt=0), FREE] = 50
    """Disk in the user's cache folder for copies of videos that tables and tars hold as bytes."""
    fps: Annotated[float, Field(ge=0), CLIPS] = 8
    """Frames per second by time stamps; 0 keeps the source's rate."""
    skip_frames_start: Annotated[Count, CLIPS] = 0
    """Source frames left out at the start."""
    skip_frames_end: Annotated[Count, CLIPS] = 0
    """Source frames left out at the end."""
    max_num_frames: Annotated[Positive, BUCKETS] = 49
    """No clip has more frames than this."""
    windows_per_clip: Annotated[Positive, CLIPS] = 1
    """Windows cut from one long video."""
    window_placement: Annotated[Literal["even", "consecutive"], CLIPS] = "even"
    """Windows spread over the whole video, or one after the other from its start."""
    frame_buckets: Annotated[Parts[Positive], CLIPS] = (9, 17, 25, 33, 41, 49)
    """Frame counts that clips are cut to, 8k+1: the VAE gives back only these as they are."""
    allow_uneven_frame_buckets: Annotated[bool, FREE] = False
    """Take other counts too; 5 frames decode to 8, 13 to 16, 21 to 24."""
    height: Annotated[Side | None, BUCKETS] = None
    """Fixed height instead of `resolution_buckets`."""
    width: Annotated[Side | None, BUCKETS] = None
    """Fixed width instead of `resolution_buckets`."""
    resolution_buckets: Annotated[Parts[tuple[Side, Side]], CLIPS] = ((480, 720),)
    """Heights x widths, also as "480x720"; a clip takes the nearest in aspect ratio, enlarged at most twice."""
    video_reshape_mode: Annotated[Literal["center", "random", "letterbox"], CLIPS] = "center"
    """Crop in the middle, crop at a place drawn by the clip's bytes, or pad with black."""
    random_flip: Annotated[bool, CLIPS] = False
    """Also store a horizontally mirrored copy of every clip."""
    validation_prompts: Annotated[OneOrMore[Text], FREE] = ()
    """Encoded with the captions, so that stage 2 can sample without T5."""
    negative_prompt: Annotated[Text, FREE] = ""
    """Encoded with the captions, for guidance."""
    held_out_clips: Annotated[Count, VIEW] = 0
    """Clips kept out of training for the held-out loss, chosen by their bytes."""

    @model_validator(mode="after")
    def _sizes_agree(self) -> "Data":
        if (self.height is None) != (self.width is None):
            raise ValueError("height and width are set together")
        if not any(bucket <= self.max_num_frames for bucket in self.frame_buckets):
            raise ValueError(f"every one of frame_buckets is above max_num_frames = {self.max_num_frames}")
        uneven = [frames for frames in self.frame_buckets if frames % 8 != 1 and frames <= self.max_num_frames]
        if uneven and not self.allow_uneven_frame_buckets:
            below = (uneven[0] - 1) // 8 * 8 + 1
            raise ValueError(
                f"frame_buckets has {uneven[0]}, which the VAE gives back as another number of frames; use {below} or "
                f"{below + 8}, or set data.allow_uneven_frame_buckets=true"
            )
        return self

    @property
    def resolutions(self) -> tuple[tuple[int, int], ...]:
        """The heights x widths in force."""
        if self.height is not None and self.width is not None:
            return ((self.height, self.width),)
        return self.resolution_buckets


class Precompute(Table):
    cache: Annotated[PlaceOrName, FREE]
    """Folder or fsspec URL of the cache, shared by every run."""
    local_cache_gib: Annotated[float, Field(gt=0), FREE] = 50
    """Remote cache: disk that local copies of its shards may take, in the user's cache folder."""
    device: Annotated[Device, FREE] = "auto"
    """"cpu", "cuda", "cuda:1"; auto takes the GPU when there is one."""
    vae_dtype: Annotated[Literal["auto", "fp32", "tf32", "fp16", "bf16"], Shapes("latents", "precision")] = "auto"
    """Precision of the VAE and of the stored moments; auto is the checkpoint's own, fp16 raised to tf32.

    tf32 is fp32 in which a GPU rounds factors to 10 bits of mantissa, as many as fp16 has.
    """
    text_dtype: Annotated[Precision, Shapes("prompts", "precision")] = "auto"
    """Precision of T5 and of the stored embeddings; auto is the one that T5 is published in."""
    text_offload: Annotated[bool, FREE] = False
    """Keep T5's weights in host memory, for a small card: slower, the same embeddings."""
    enable_tiling: Annotated[bool, Shapes("latents", "tiling")] = False
    """Encode in spatial tiles: less memory, other latents."""
    enable_slicing: Annotated[bool, Shapes("latents", "slicing")] = False
    """Encode a batch one clip at a time."""
    channels_last: Annotated[bool, Shapes("latents", "channels_last")] = False
    """The VAE in channels_last_3d layout; the same values up to rounding, but other keys."""
    compile_vae: Annotated[bool, Shapes("latents", "compiled")] = False
    """torch.compile the VAE's encoder, once per bucket; the same values up to rounding, but other keys."""
    vae_batch_size: Annotated[Positive, FREE] = 1
    """Clips of one bucket encoded together."""
    text_batch_size: Annotated[Positive, FREE] = 8
    """Prompts encoded together."""
    clips_per_shard: Annotated[Positive, FREE] = 64
    """Clips in one shard, the unit of work, retry and resume."""
    prompts_per_shard: Annotated[Positive, FREE] = 256
    """Prompts in one shard."""
    noised_image_count: Annotated[Count, Shapes("image_latents", "image_conditions.noised")] = 4
    """I2V: noise-augmented first frames stored beside the clean one."""
    decoder: Annotated[Literal["auto", "pyav", "decord"], FREE] = "auto"
    """auto: decord where it is proven equal to PyAV, else PyAV."""
    decode_workers: Annotated[Positive, FREE] = 2
    """Child processes that decode."""
    decode_deadline_seconds: Annotated[float, Field(gt=0, le=86_400), FREE] = 120
    """A video that takes longer is skipped."""
    decode_memory_gib: Annotated[float, Field(ge=0.25, le=1024), FREE] = 4
    """Address space a decoding process may take."""
    remember_files: Annotated[bool, FREE] = False
    """Keep in the cache what each file holds, by its inode, size and times; a known file is not read again."""
    retry_skipped: Annotated[bool, FREE] = False
    """Try the clips once more that an earlier run could not encode."""


class Train(Table):
    output_dir: Annotated[Place, FREE]
    """The run folder: config, metrics.jsonl, checkpoints, export."""
    lora_rank: Annotated[Positive, FIXED_BY_RUN] = 128
    """`--rank` there; rank alone is a process's number here. "auto" takes that of `initial_adapter`."""
    lora_alpha: Annotated[float, Field(gt=0), FIXED_BY_RUN] = 128
    """The adapter is scaled by lora_alpha / lora_rank."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1), FIXED_BY_RUN] = 0.0
    """Dropout before the adapter; masks are drawn per pack, so another number of processes draws others."""
    lora_target_modules: Annotated[Parts[Name], FIXED_BY_RUN] = LORA_TARGETS
    """Linear layers that get an adapter."""
    use_rslora: Annotated[bool, FIXED_BY_RUN] = False
    """Scale the adapter by lora_alpha / sqrt(lora_rank) instead (arXiv 2312.03732)."""
    use_dora: Annotated[bool, FIXED_BY_RUN] = False
    """Also train the length of each weight column (arXiv 2402.09353); the export loads through peft."""
    initial_adapter: Annotated[Place | None, RESOLVED_BY_RUN] = None
    """A LoRA to start from (export folder or file of any trainer), of the same rank, alpha and layers."""
    learning_rate: Annotated[float, Field(gt=0), FREE] = 1e-4
    """Peak learning rate."""
    lr_scheduler: Annotated[Schedule, FREE] = "constant"
    """Shape of the learning rate, stepped once per optimizer step."""
    lr_warmup_steps: Annotated[Count, FREE] = 0
    """Optimizer steps of linear warm-up (ignored by "constant")."""
    lr_num_cycles: Annotated[Positive, FREE] = 1
    """Restarts of cosine_with_restarts."""
    lr_power: Annotated[float, Field(gt=0), FREE] = 1.0
    """Power of polynomial."""
    optimizer: Annotated[Literal["adam", "adamw", "adamw8bit", "prodigy"], FIXED_BY_RUN] = "adamw"
    """adam adds weight decay to the gradient (L2), the others decay the weights; the last two are optional extras."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1), FIXED_BY_RUN] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1), FIXED_BY_RUN] = 0.95
    """Decay of the second moment."""
    adam_epsilon: Annotated[float, Field(gt=0), FIXED_BY_RUN] = 1e-8
    """Added to the denominator."""
    adam_weight_decay: Annotated[float, Field(ge=0), FIXED_BY_RUN] = 1e-4
    """Weight decay."""
    prodigy_beta3: Annotated[Annotated[float, Field(ge=0, lt=1)] | None, FREE] = None
    """Decay of prodigy's step size statistics; None is sqrt(adam_beta2)."""
    prodigy_decouple: Annotated[bool, FREE] = False
    """Let prodigy decay the weights, as adamw, instead of adding to the gradient."""
    prodigy_use_bias_correction: Annotated[bool, FREE] = False
    """Adam's bias correction in prodigy."""
    prodigy_safeguard_warmup: Annotated[bool, FREE] = False
    """Leave the learning rate out of prodigy's estimate, for warm-up."""
    max_grad_norm: Annotated[float, Field(gt=0), FREE] = 1.0
    """Gradients are scaled down to this norm."""
    max_train_steps: Annotated[Positive | None, FREE] = None
    """Optimizer steps; None takes num_train_epochs."""
    num_train_epochs: Annotated[Positive, FREE] = 1
    """Passes over the training clips, when max_train_steps is not set."""
    global_batch_size: Annotated[Positive, FIXED_BY_RUN] = 1
    """Clips per optimizer step, whatever the number of processes."""
    max_tokens_per_pack: Annotated[Positive, FREE] = 1
    """Tokens of one forward; a larger clip is a pack of its own, so 1 is one clip at a time."""
    gradient_checkpointing: Annotated[bool, FREE] = False
    """Recompute each block in the backward pass: less memory, more time."""
    mixed_precision: Annotated[
        Precision, BeforeValidator(lambda value: "fp32" if value == "no" else value), RESOLVED_BY_RUN
    ] = "auto"
    """Precision of the frozen transformer and its activations (adapters are fp32); auto is the checkpoint's own.

    "no" is fp32, as in the reference script."""
    deterministic: Annotated[bool, FREE] = False
    """Use deterministic kernels alone, so that a run on a GPU resumes bit for bit too; slower there."""
    allow_tf32: Annotated[bool, FREE] = False
    """Let matrix products of fp32 use TF32 on the GPU."""
    timestep_sampling: Annotated[Literal["uniform", "stratified"], FIXED_BY_RUN] = "uniform"
    """stratified: the clips of a global batch share out the schedule in equal parts."""
    snr_gamma: Annotated[Annotated[float, Field(gt=0)] | None, FIXED_BY_RUN] = None
    """Min-SNR loss weight with this gamma (arXiv 2303.09556), usually 5; None weighs all timesteps alike."""
    caption_dropout: Annotated[Fraction, FIXED_BY_RUN] = 0.0
    """Chance that a clip is trained with the empty prompt."""
    noised_image_dropout: Annotated[Fraction, FIXED_BY_RUN] = 0.05
    """I2V: chance that a clip is trained with an empty image condition."""
    shuffle_shards: Annotated[Literal["auto", "all"] | Positive, RESOLVED_BY_RUN] = "auto"
    """Shards whose clips are mixed at a time; auto: all in a folder, of a URL half of those local_cache_gib holds."""
    seed: Annotated[Count, FIXED_BY_RUN] = 42
    """Order, noise, timesteps, posterior draws and the adapter's initial weights."""
    checkpointing_steps: Annotated[Positive, FREE] = 500
    """Optimizer steps between checkpoints."""
    checkpoints_total_limit: Annotated[int, Field(ge=2), FREE] = 2
    """Checkpoints kept; two at least, so that a damaged newest one has a predecessor."""
    resume_from_checkpoint: Annotated[PlaceOrName, FREE] = "latest"
    """"latest", a checkpoint's name in the run folder, or "none" to refuse a run folder that has checkpoints.

    A name must be the newest checkpoint: move newer ones out of the run folder first."""
    validation_steps: Annotated[Count, FREE] = 0
    """Optimizer steps between held-out losses, which are taken at the end in any case; 0 is only at the end."""
    stop_after_evaluations_without_gain: Annotated[Count, FREE] = 0
    """End the run after this many held-out losses in a row above the lowest one; 0 is never."""
    preview_steps: Annotated[Count, FREE] = 0
    """Optimizer steps between previews: data.validation_prompts, as [sample] says, to latents; 0 is never."""
    report_to: Annotated[Literal["none", "tensorboard", "wandb", "trackio"], FREE] = "none"
    """Where the metrics also go; metrics.jsonl is always written."""
    tracker_name: Annotated[Name, FREE] = "precog"
    """The tracker's name of the project."""
    log_steps: Annotated[Count, FREE] = 0
    """Print a line every so many steps where there is no terminal; 0 prints one every ten seconds."""
    log_clips: Annotated[bool, FREE] = False
    """Write each step's clips and timesteps to metrics.jsonl."""
    nccl_timeout: Annotated[Positive, FREE] = 1800
    """Seconds that a process waits for the others before it fails, with NCCL or gloo; a preview has to fit in."""
    device: Annotated[Literal["auto", "cpu", "cuda"], FREE] = "auto"
    """auto takes this process's GPU when there is one; CUDA_VISIBLE_DEVICES says which that is."""

    @model_validator(mode="after")
    def _options_agree(self) -> "Train":
        changed = [name for name in sorted(self.model_fields_set) if name.startswith("prodigy_")]
        given = [name for name in changed if getattr(self, name) != type(self).model_fields[name].default]
        if given and self.optimizer != "prodigy":
            raise ValueError(f"{given[0]} needs optimizer = 'prodigy'")
        return self


class Memory(Table):
    """Memory of training on the card. "auto" fields are chosen by the card's free memory and the largest pack."""

    activations: Annotated[Literal["auto", "block_input", "attention_output", "full"], FREE] = "auto"
    """What a block keeps for its backward pass; block_input recomputes all, attention_output all but attention."""
    full_blocks: Annotated[Literal["auto"] | Count, FREE] = "auto"
    """Blocks, counted from the last, that keep "full" whatever `activations` says; auto takes as many as fit."""
    offload_activations: Annotated[bool | Literal["auto"], FREE] = "auto"
    """Keep in host memory what the blocks keep, and the layers that make their modulation."""
    stream_weights: Annotated[Literal["auto", 0] | Annotated[int, Field(ge=2)], FREE] = "auto"
    """Blocks whose frozen weights are on the card, the others wait in host memory; 0 is all of them."""
    base_precision: Annotated[Literal["model", "int8", "fp8"], FIXED_BY_RUN] = "model"
    """Storage of the frozen blocks' weights; weight-only, with one scale per row."""
    attention: Annotated[Literal["auto", "flash3", "cudnn", "flash", "efficient", "math"], FREE] = "auto"
    """Kernels of attention for the whole run; auto takes the fastest that works on the card, found by trying.

    flash3 is FlashAttention 3 on Hopper, from the package flash-attn-3."""
    compile: Annotated[bool | Literal["auto"], FREE] = "auto"
    """Fuse norms, modulation, gates and rotary positions with torch.compile; auto is on with a GPU and triton."""


class SampleLora(Table):
    path: Place
    """Run folder, RUN@300 (a step), RUN@best (lowest held-out loss), export folder, or file of any trainer."""
    strength: float = 1.0
    """Factor of the adapter, as in diffusers' set_adapters."""


class Sampling(Table):
    output_dir: Annotated[Place, FREE] = Path("samples")
    """Where the mp4, JSON and PNG files land."""
    prompts: Annotated[OneOrMore[Text], FREE] = ()
    """One video each, with and without the adapter."""
    prompts_file: Annotated[Place | None, FREE] = None
    """Text file with one more prompt per line."""
    images: Annotated[OneOrMore[Place], FREE] = ()
    """I2V: the first frame for each prompt."""
    video: Annotated[Place | None, FREE] = None
    """Video to start from, for a text-to-video checkpoint; read at `fps` from its beginning."""
    strength: Annotated[float, Field(gt=0, le=1), FREE] = 0.8
    """Share of the denoising steps that `video` goes through: 1 keeps almost nothing of it."""
    loras: Annotated[tuple[SampleLora, ...], FREE] = ()
    """Adapters that act together, or in a grid one by one; empty is the export of [train]."""
    num_frames: Annotated[Positive, FREE] = 49
    """Frames to make."""
    height: Annotated[Side, FREE] = 480
    """Pixels."""
    width: Annotated[Side, FREE] = 720
    """Pixels."""
    fps: Annotated[Positive, FREE] = 8
    """Playing rate of the mp4."""
    num_inference_steps: Annotated[Positive, IN_PREVIEW] = 50
    """Denoising steps."""
    scheduler: Annotated[Literal["auto", "ddim", "dpm"], IN_PREVIEW] = "auto"
    """auto is the checkpoint's own."""
    guidance_scale: Annotated[float, Field(ge=0), IN_PREVIEW] = 6.0
    """Classifier-free guidance; 1 is none."""
    use_dynamic_cfg: Annotated[bool, IN_PREVIEW] = False
    """Vary the guidance over the steps."""
    seed: Annotated[Count, IN_PREVIEW] = 42
    """The same noise with and without the adapter."""
    num_videos_per_prompt: Annotated[Positive, FREE] = 1
    """Videos from the seeds `seed`, `seed` + 1, ..."""
    dtype: Annotated[Precision, FREE] = "auto"
    """Precision of the pipeline; auto is the checkpoint's own."""
    device: Annotated[Device, FREE] = "auto"
    """"cpu", "cuda", "cuda:1"; auto takes the GPU when there is one."""
    memory: Annotated[Literal["auto", "none", "model_offload", "group_offload", "sequential_offload"], FREE] = "auto"
    """Weights that wait in host memory: none, those of the part not running, all but a block's, all but a layer's."""
    base_precision: Annotated[Literal["model", "int8", "fp8"], FREE] = "model"
    """Storage of the weights of transformer and T5; weight-only, with one scale per row; T5 takes int8 for fp8."""
    enable_tiling: Annotated[bool | Literal["auto"], FREE] = "auto"
    """Decode in spatial tiles: less memory, other pixels at their borders; auto is on with a GPU."""
    compile: Annotated[bool, FREE] = False
    """torch.compile the transformer's blocks: minutes for the first video, less for the others."""


class Config(BaseModel):
    """The whole experiment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Model
    data: Data
    precompute: Precompute
    train: Train
    memory: Memory = Memory()
    sample: Sampling = Sampling()


TABLES: dict[str, type[Table]] = {
    "model": Model,
    "data": Data,
    "precompute": Precompute,
    "train": Train,
    "memory": Memory,
    "sample": Sampling,
}
INSTEAD_OF_FLAG = {
    "cache_dir": "use model.model_cache_dir",
    "dataloader_num_workers": "one background reader is always used",
    "gradient_accumulation_steps": "use train.global_batch_size and train.max_tokens_per_pack",
    "hub_model_id": "use `precog push RUN user/name`",
    "hub_token": "never a field; log in with `hf auth login` or set HF_TOKEN",
    "logging_dir": "the tracker writes into train.output_dir, under train.tracker_name",
    "num_validation_videos": "use train.preview_steps, or sample.num_videos_per_prompt",
    "push_to_hub": "use `precog push RUN user/name`",
    "rank": "use train.lora_rank",
    "scale_lr": "train.learning_rate is used as it is",
    "train_batch_size": "use train.global_batch_size and train.max_tokens_per_pack",
    "use_8bit_adam": "use train.optimizer = 'adamw8bit'",
    "validation_epochs": "use train.preview_steps",
    "validation_images": "use sample.images",
    "validation_prompt": "use data.validation_prompts",
    "validation_prompt_separator": "use data.validation_prompts",
}
"""Flags of diffusers' train_cogvideox_lora.py without a field of the same name, and what to do."""


def shaping_fields() -> dict[str, Shapes]:
    """Return {dotted name of a field: what it shapes}."""
    found = {}
    for table, kind in TABLES.items():
        for name, field in kind.model_fields.items():
            shapes = [entry for entry in field.metadata if isinstance(entry, Shapes)]
            assert len(shapes) == 1, f"{table}.{name}: annotate the field with what it shapes, such as FREE"
            found[f"{table}.{name}"] = shapes[0]
    return found


def fields_shaping(*parts: ShapedPart) -> list[str]:
    """Return the dotted names of the fields that shape any of `parts`, sorted."""
    return sorted(name for name, shapes in shaping_fields().items() if shapes.part in parts)


def recipe_fields(*parts: ShapedPart) -> dict[str, str]:
    """Return {dotted name of a recipe's entry: the field that it comes from} for "latents" or "prompts"."""
    return {shapes.recipe_entry: name for name, shapes in shaping_fields().items() if shapes.part in parts}


def field_value(config: Config, name: str) -> Any:
    """Return the value of the field with a dotted name, as JSON has it."""
    table, _, field = name.partition(".")
    return getattr(config, table).model_dump(mode="json", include={field})[field]

"""Conventions of a CogVideoX checkpoint, read from its own configs and never from its name.

Source of every rule: diffusers 0.42, `models/transformers/cogvideox_transformer_3d.py` and `pipelines/cogvideo/`.
Latent heights and widths are one eighth of those in pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import UsageError
from shared.model.geometry import SPATIAL_FACTOR, TEMPORAL_FACTOR, Bucket, video_tokens

RawConfig = Mapping[str, Any]
Positions = Literal["sincos", "rope_crop", "rope_slice", "rope_crop_learned"]
Size = Annotated[int, Field(gt=0, lt=10**9)]
Factor = Annotated[float, Field(gt=0, lt=10**9)]


class ComponentConfig(BaseModel):
    """Keys of a component's config; defaults are those of the diffusers class, for an older checkpoint."""

    model_config = ConfigDict(strict=True)


class TransformerKeys(ComponentConfig):
    attention_head_dim: Size = 64
    in_channels: Size = 16
    out_channels: Size = 16
    ofs_embed_dim: Size | None = None
    text_embed_dim: Size = 4096
    sample_height: Size = 60
    sample_width: Size = 90
    sample_frames: Size = 49
    patch_size: Size = 2
    patch_size_t: Size | None = None
    temporal_compression_ratio: Size = 4
    max_text_seq_length: Size = 226
    spatial_interpolation_scale: Factor = 1.875
    temporal_interpolation_scale: Factor = 1.0
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False


class VaeKeys(ComponentConfig):
    latent_channels: Size = 16
    temporal_compression_ratio: Size = 4
    block_out_channels: Sequence[Size] = (128, 256, 256, 512)
    scaling_factor: Factor = 1.15258426
    invert_scale_latents: bool = False


class SchedulerKeys(ComponentConfig):
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    snr_shift_scale: Factor = 3.0


Keys = TypeVar("Keys", bound=ComponentConfig)
OFS = 2.0
"""The pipeline's constant for checkpoints with an ofs embedding (`pipeline_cogvideox_image2video.py`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conventions:
    """Everything that cache, trainer and sampler must agree on."""

    positions: Positions
    """Additive sincos; RoPE on the crop-region grid; RoPE cut from a grid; crop-region RoPE plus a learned table."""
    in_channels: int
    out_channels: int
    """Channels of the velocity and of the latents."""
    image_to_video: bool
    """The input is [noisy latents, image condition] on channels, twice those of the latents."""
    patch_size: int
    """Latent height and width of a token."""
    patch_size_t: int | None
    """Latent frames of a token; None is one frame and a convolution."""
    attention_head_dim: int
    """Width of the rotary table."""
    ofs: float | None
    """Input of the ofs embedding; None without one."""
    text_embed_dim: int
    """D of prompt_embeds."""
    text_length: int
    """L of prompt_embeds as encoded (`max_text_seq_length`)."""
    text_length_fixed: bool
    """L must be `text_length`, because positions are added over text and video together."""
    sample_height: int
    sample_width: int
    """Latent height and width of the position grid."""
    sample_frames: int
    """Pixel frames of the position table."""
    spatial_interpolation_scale: float
    """Divisor of heights and widths in sincos positions."""
    temporal_interpolation_scale: float
    """Divisor of frames in sincos positions."""
    scaling_factor: float
    """Factor from a posterior draw to latents."""
    image_scaling_factor: float
    """Factor from a posterior draw to image latents; `invert_scale_latents` of the VAE inverts it."""
    snr_shift_scale: float
    """s in the schedule's alphas_cumprod / (s + (1 - s) * alphas_cumprod)."""
    zero_terminal_snr: bool
    """The schedule ends at zero signal."""

    @property
    def name(self) -> str:
        """For printing, such as "CogVideoX 1.0 I2V, RoPE + learned positions"."""
        words = {"sincos": "sincos", "rope_crop": "RoPE", "rope_slice": "sliced RoPE"}
        positions = words.get(self.positions, "RoPE + learned")
        version, task = "1.5" if self.patch_size_t else "1.0", "I2V" if self.image_to_video else "T2V"
        return f"CogVideoX {version} {task}, {positions} positions"

    def num_tokens(self, bucket: Bucket) -> int:
        """Return the text and video tokens of a clip."""
        return self.text_length + video_tokens(bucket, self.patch_size, self.patch_size_t)


def read_conventions(transformer: RawConfig, vae: RawConfig, scheduler: RawConfig) -> Conventions:
    """Return the conventions of a checkpoint from its configs; raise `UsageError` if they contradict each other."""
    t = _read(TransformerKeys, "transformer", transformer)
    v = _read(VaeKeys, "vae", vae)
    s = _read(SchedulerKeys, "scheduler", scheduler)
    positions = _read_positions(t)
    _check(t, v, s)
    return Conventions(
        positions=positions,
        image_to_video=t.in_channels == 2 * v.latent_channels,
        ofs=OFS if t.ofs_embed_dim else None,
        text_length=t.max_text_seq_length,
        text_length_fixed=positions in ("sincos", "rope_crop_learned"),
        scaling_factor=v.scaling_factor,
        image_scaling_factor=1 / v.scaling_factor if v.invert_scale_latents else v.scaling_factor,
        snr_shift_scale=s.snr_shift_scale,
        zero_terminal_snr=s.rescale_betas_zero_snr,
        **{field.name: getattr(t, field.name) for field in fields(Conventions) if hasattr(t, field.name)},
    )


def refusal(conventions: Conventions, bucket: Bucket) -> str | None:
    """Return one line that says why clips of `bucket` cannot be trained, or None."""
    step = SPATIAL_FACTOR * conventions.patch_size
    if bucket.height % step or bucket.width % step:
        return f"{bucket}: height and width must be multiples of {step} (VAE factor times patch size)"
    if bucket.frames % TEMPORAL_FACTOR != 1:
        return f"{bucket}: frames must be {TEMPORAL_FACTOR}k+1, such as 1, 9, 49"
    height, width = conventions.sample_height * SPATIAL_FACTOR, conventions.sample_width * SPATIAL_FACTOR
    learned = Bucket(conventions.sample_frames, height, width)
    if conventions.positions == "rope_crop_learned" and bucket != learned:
        return f"{bucket}: the learned position table of this checkpoint covers only {learned}; use that bucket"
    if conventions.positions == "rope_slice" and (bucket.height > height or bucket.width > width):
        return f"{bucket}: the position grid of this checkpoint ends at {height}x{width} pixels"
    return None


def _read(keys: type[Keys], part: str, config: RawConfig) -> Keys:
    """Read the keys of a component's config. Raises `UsageError` for a value of another kind or out of range."""
    try:
        return keys.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        expected = first["msg"].removeprefix("Input should be ")
        raise UsageError(
            f"{part} config: {first['loc'][0]}: expected {expected}, got {first['input']!r}; fix the config"
        ) from None


def _read_positions(keys: TransformerKeys) -> Positions:
    """Return the kind of positions. Raises `UsageError` for combinations that no diffusers forward runs."""
    rotary, learned = keys.use_rotary_positional_embeddings, keys.use_learned_positional_embeddings
    kinds: dict[tuple[bool, bool, bool], Positions] = {
        (False, False, False): "sincos",
        (True, False, False): "rope_crop",
        (True, False, True): "rope_slice",
        (True, True, False): "rope_crop_learned",
    }
    try:
        return kinds[rotary, learned, keys.patch_size_t is not None]
    except KeyError:
        raise UsageError(
            f"transformer config: use_rotary_positional_embeddings = {rotary}, use_learned_positional_embeddings = "
            f"{learned} and patch_size_t = {keys.patch_size_t} do not go together; choose a CogVideoX checkpoint"
        ) from None


def _check(t: TransformerKeys, v: VaeKeys, s: SchedulerKeys) -> None:
    """Raise `UsageError` for configs that contradict each other or `shared.model.geometry`."""
    channels, given = v.latent_channels, t.in_channels
    ratio, temporal = t.temporal_compression_ratio, v.temporal_compression_ratio
    factors = temporal, 2 ** (len(v.block_out_channels) - 1)
    size = f"{t.sample_height}x{t.sample_width}"
    for holds, problem in (
        (given in (channels, 2 * channels), f"in_channels: expected {channels} or (I2V) {2 * channels}, got {given}"),
        (t.out_channels == channels, f"out_channels: expected the VAE's {channels}, got {t.out_channels}"),
        (not t.ofs_embed_dim or given != channels, "ofs_embed_dim: needs an image condition"),
        (ratio == temporal, f"temporal_compression_ratio: expected the VAE's {temporal}, got {ratio}"),
        (
            factors == (TEMPORAL_FACTOR, SPATIAL_FACTOR),
            f"VAE: expected compression 4x8x8, got {factors} in time, space",
        ),
        (
            t.sample_height % t.patch_size == t.sample_width % t.patch_size == 0,
            f"sample size: {size} must be multiples of patch_size {t.patch_size}",
        ),
        (
            s.prediction_type == "v_prediction",
            f"scheduler prediction_type: expected 'v_prediction', got {s.prediction_type!r}",
        ),
    ):
        if not holds:
            raise UsageError(f"{problem}; choose a CogVideoX checkpoint")

"""Conventions of a CogVideoX checkpoint, read from its own configs and never from its name.

Source of every rule: diffusers 0.42, `models/transformers/cogvideox_transformer_3d.py` and `pipelines/cogvideo/`.
Latent heights and widths are one eighth of those in pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from shared.errors import UsageError
from shared.model.geometry import SPATIAL_FACTOR, TEMPORAL_FACTOR, Bucket

RawConfig = Mapping[str, Any]
Positions = Literal["sincos", "rope_crop", "rope_slice", "rope_crop_learned"]

TRANSFORMER_DEFAULTS: RawConfig = {
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "ofs_embed_dim": None,
    "text_embed_dim": 4096,
    "sample_height": 60,
    "sample_width": 90,
    "sample_frames": 49,
    "patch_size": 2,
    "patch_size_t": None,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 226,
    "spatial_interpolation_scale": 1.875,
    "temporal_interpolation_scale": 1.0,
    "use_rotary_positional_embeddings": False,
    "use_learned_positional_embeddings": False,
}
VAE_DEFAULTS: RawConfig = {
    "latent_channels": 16,
    "temporal_compression_ratio": 4,
    "block_out_channels": (128, 256, 256, 512),
    "scaling_factor": 1.15258426,
    "invert_scale_latents": False,
}
SCHEDULER_DEFAULTS: RawConfig = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False, "snr_shift_scale": 3.0}
"""Values of the diffusers classes for keys that an older checkpoint leaves out."""

OFS = 2.0
"""The pipeline's constant for checkpoints with an ofs embedding (`pipeline_cogvideox_image2video.py`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conventions:
    """Everything that cache, trainer and sampler must agree on."""

    positions: Positions
    """Additive sincos; RoPE on the crop-region grid; RoPE cut from a grid; crop-region RoPE plus a learned table."""
    in_channels: int
    """Channels of the transformer's input: those of the latents, twice as many for image-to-video."""
    out_channels: int
    """Channels of the velocity, as many as of the latents."""
    image_to_video: bool
    """The input is [noisy latents, image condition] on channels."""
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
    """Latent height of the position grid."""
    sample_width: int
    """Latent width of the position grid."""
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
        version = "1.5" if self.patch_size_t else "1.0"
        task = "I2V" if self.image_to_video else "T2V"
        words = {
            "sincos": "sincos positions",
            "rope_crop": "RoPE positions",
            "rope_slice": "sliced RoPE positions",
            "rope_crop_learned": "RoPE + learned positions",
        }
        return f"CogVideoX {version} {task}, {words[self.positions]}"

    @property
    def fixed_bucket(self) -> Bucket | None:
        """The only bucket of a learned position table; None without one."""
        if self.positions != "rope_crop_learned":
            return None
        return Bucket(self.sample_frames, self.sample_height * SPATIAL_FACTOR, self.sample_width * SPATIAL_FACTOR)


def read_conventions(
    transformer: RawConfig, vae: RawConfig, scheduler: RawConfig, *, drop_learned_positions: bool = False
) -> Conventions:
    """Return the conventions of a checkpoint from the contents of its configs.

    `drop_learned_positions` leaves the learned position table out, see `without_learned_positions`.
    Raises `UsageError` for configs that contradict each other.
    """
    t = _complete("transformer", transformer, TRANSFORMER_DEFAULTS)
    v = _complete("vae", vae, VAE_DEFAULTS)
    s = _complete("scheduler", scheduler, SCHEDULER_DEFAULTS)
    positions = _read_positions(t)
    _check(t, v, s)
    conventions = Conventions(
        positions=positions,
        in_channels=t["in_channels"],
        out_channels=t["out_channels"],
        image_to_video=t["in_channels"] == 2 * v["latent_channels"],
        patch_size=t["patch_size"],
        patch_size_t=t["patch_size_t"],
        attention_head_dim=t["attention_head_dim"],
        ofs=OFS if t["ofs_embed_dim"] else None,
        text_embed_dim=t["text_embed_dim"],
        text_length=t["max_text_seq_length"],
        text_length_fixed=positions in ("sincos", "rope_crop_learned"),
        sample_height=t["sample_height"],
        sample_width=t["sample_width"],
        sample_frames=t["sample_frames"],
        spatial_interpolation_scale=float(t["spatial_interpolation_scale"]),
        temporal_interpolation_scale=float(t["temporal_interpolation_scale"]),
        scaling_factor=float(v["scaling_factor"]),
        image_scaling_factor=1 / v["scaling_factor"] if v["invert_scale_latents"] else float(v["scaling_factor"]),
        snr_shift_scale=float(s["snr_shift_scale"]),
        zero_terminal_snr=bool(s["rescale_betas_zero_snr"]),
    )
    return without_learned_positions(conventions) if drop_learned_positions else conventions


def without_learned_positions(conventions: Conventions) -> Conventions:
    """Return the conventions of the same checkpoint on RoPE alone, at any frames, height, width and text length.

    The model needs training then, and diffusers' forward needs `drop_learned_table`.
    Raises `UsageError` for a checkpoint without a learned table.
    """
    if conventions.positions != "rope_crop_learned":
        raise UsageError(f"model.drop_learned_positions: {conventions.name} has no learned table; leave the field out")
    return replace(conventions, positions="rope_crop", text_length_fixed=False)


def drop_learned_table(transformer: Any) -> None:
    """Make diffusers' own forward ignore the learned table (`CogVideoXPatchEmbed.forward`)."""
    transformer.patch_embed.use_learned_positional_embeddings = False


def refusal(conventions: Conventions, bucket: Bucket) -> str | None:
    """Return one line that says why clips of `bucket` cannot be trained, or None."""
    step = SPATIAL_FACTOR * conventions.patch_size
    if bucket.height % step or bucket.width % step:
        return f"{bucket}: height and width must be multiples of {step} (VAE factor times patch size)"
    if bucket.frames % TEMPORAL_FACTOR != 1:
        return f"{bucket}: frames must be {TEMPORAL_FACTOR}k+1, such as 1, 9, 49"
    fixed = conventions.fixed_bucket
    if fixed is not None and bucket != fixed:
        return (
            f"{bucket}: the learned position table of this checkpoint covers only {fixed}; "
            "use that bucket or set model.drop_learned_positions=true"
        )
    limit = [size * SPATIAL_FACTOR for size in (conventions.sample_height, conventions.sample_width)]
    if conventions.positions == "rope_slice" and (bucket.height > limit[0] or bucket.width > limit[1]):
        return f"{bucket}: the position grid of this checkpoint ends at {limit[0]}x{limit[1]} pixels"
    return None


def _complete(part: str, config: RawConfig, defaults: RawConfig) -> RawConfig:
    """Return `config` over `defaults`. Raises `UsageError` for a value of another kind than the default."""
    for key, default in defaults.items():
        value = config.get(key, default)
        if not _is_like(value, default):
            raise UsageError(f"{part} config: {key}: expected a value like {default!r}, got {value!r}; fix the config")
    return {**defaults, **config}


def _is_like(value: object, default: object) -> bool:
    """Return whether `value` is of the kind of `default`: None, bool, str, list, or a positive (whole) number."""
    if value is None or isinstance(value, bool) or isinstance(default, bool):
        return type(value) is type(default)
    if isinstance(default, int | float | None):
        return (
            isinstance(value, int | float) and 0 < value < 1e9 and (isinstance(default, float) or value == int(value))
        )
    return isinstance(value, str) if isinstance(default, str) else isinstance(value, list | tuple)


def _read_positions(transformer: RawConfig) -> Positions:
    """Return the kind of positions. Raises `UsageError` for combinations that no diffusers forward runs."""
    learned, temporal = transformer["use_learned_positional_embeddings"], transformer["patch_size_t"] is not None
    if not transformer["use_rotary_positional_embeddings"]:
        if learned or temporal:
            given = "learned positions" if learned else "patch_size_t"
            raise UsageError(f"{given} without use_rotary_positional_embeddings; choose a CogVideoX checkpoint")
        return "sincos"
    if temporal:
        if learned:
            raise UsageError("patch_size_t with use_learned_positional_embeddings; choose a CogVideoX checkpoint")
        return "rope_slice"
    return "rope_crop_learned" if learned else "rope_crop"


def _check(transformer: RawConfig, vae: RawConfig, scheduler: RawConfig) -> None:
    """Raise `UsageError` for configs that contradict each other or `shared.model.geometry`."""
    channels, given, returned = vae["latent_channels"], transformer["in_channels"], transformer["out_channels"]
    temporal, ratio = vae["temporal_compression_ratio"], transformer["temporal_compression_ratio"]
    factors = temporal, 2 ** (len(vae["block_out_channels"]) - 1)
    height, width, patch = (transformer[name] for name in ("sample_height", "sample_width", "patch_size"))
    kind = scheduler["prediction_type"]
    for holds, problem in (
        (given in (channels, 2 * channels), f"in_channels: expected {channels} or (I2V) {2 * channels}, got {given}"),
        (returned == channels, f"out_channels: expected the VAE's {channels}, got {returned}"),
        (not transformer["ofs_embed_dim"] or given != channels, "ofs_embed_dim: needs an image condition"),
        (ratio == temporal, f"temporal_compression_ratio: expected the VAE's {temporal}, got {ratio}"),
        (
            factors == (TEMPORAL_FACTOR, SPATIAL_FACTOR),
            f"VAE: expected compression 4x8x8, got {factors} in time, space",
        ),
        (
            height % patch == width % patch == 0,
            f"sample size: {height}x{width} must be multiples of patch_size {patch}",
        ),
        (kind == "v_prediction", f"scheduler prediction_type: expected 'v_prediction', got {kind!r}"),
    ):
        if not holds:
            raise UsageError(f"{problem}; choose a CogVideoX checkpoint")

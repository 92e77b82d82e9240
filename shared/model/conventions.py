"""What a CogVideoX checkpoint expects of its inputs, read from its own configs and never from its name.

Source of every rule: diffusers 0.42, `models/transformers/cogvideox_transformer_3d.py` and `pipelines/cogvideo/`.
Latent sizes are rows and columns of latents, one eighth of the pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from shared.errors import UsageError
from shared.model.geometry import SPATIAL_FACTOR, TEMPORAL_FACTOR, Bucket

Config = Mapping[str, Any]
Positions = Literal["sincos", "rope_crop", "rope_slice", "rope_crop_learned"]

TRANSFORMER_DEFAULTS: Config = {
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
VAE_DEFAULTS: Config = {
    "latent_channels": 16,
    "temporal_compression_ratio": 4,
    "block_out_channels": (128, 256, 256, 512),
    "scaling_factor": 1.15258426,
    "invert_scale_latents": False,
}
SCHEDULER_DEFAULTS: Config = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False, "snr_shift_scale": 3.0}
"""A key that an older checkpoint leaves out has the value that the diffusers class gives it."""

OFS = 2.0
"""The pipeline's constant for checkpoints with an ofs embedding (`pipeline_cogvideox_image2video.py`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conventions:
    """What cache, trainer and sampler have to agree on."""

    positions: Positions
    """Additive sincos; RoPE on the crop-region grid; RoPE cut from a grid; crop-region RoPE plus a learned table."""
    in_channels: int
    """Channels of the transformer's input: the latents', twice that for image-to-video."""
    out_channels: int
    """Channels of the velocity, which are the latents'."""
    image_to_video: bool
    """The input is [noisy latents, image condition] on channels."""
    patch_size: int
    """Latent rows and columns per token."""
    patch_size_t: int | None
    """Latent frames per token; None is one frame and a convolution."""
    attention_head_dim: int
    """Width that the rotary table covers."""
    ofs: float | None
    """Value for the ofs embedding, where there is one."""
    text_embed_dim: int
    """D of prompt_embeds."""
    text_length: int
    """L of prompt_embeds as encoded (`max_text_seq_length`)."""
    text_length_fixed: bool
    """Positions are added over text and video together, so that L must be `text_length`."""
    sample_height: int
    """Latent rows of the position grid."""
    sample_width: int
    """Latent columns of the position grid."""
    sample_frames: int
    """Pixel frames of the position table."""
    spatial_interpolation_scale: float
    """Divides rows and columns in sincos positions."""
    temporal_interpolation_scale: float
    """Divides frames in sincos positions."""
    scaling_factor: float
    """latents = posterior draw times this."""
    image_scaling_factor: float
    """image latents = posterior draw times this; the inverse where the VAE says `invert_scale_latents`."""
    snr_shift_scale: float
    """The schedule's alphas_cumprod are divided by s + (1 - s) * alphas_cumprod."""
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
        """The one bucket that a learned position table covers, or None."""
        if self.positions != "rope_crop_learned":
            return None
        return Bucket(self.sample_frames, self.sample_height * SPATIAL_FACTOR, self.sample_width * SPATIAL_FACTOR)


def read_conventions(
    transformer: Config, vae: Config, scheduler: Config, *, drop_learned_positions: bool = False
) -> Conventions:
    """The conventions of the checkpoint whose `config.json` and `scheduler_config.json` contents these are.

    `drop_learned_positions` leaves the learned position table out, see `without_learned_positions`.
    Raises `UsageError` with one line where the configs contradict each other.
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
    """The same checkpoint on RoPE alone, which frees frames, height, width, text length: another model until trained.

    diffusers' own forward has to follow, see `drop_learned_table`. Raises `UsageError` where there is no table.
    """
    if conventions.positions != "rope_crop_learned":
        raise UsageError(f"drop_learned_positions: this checkpoint has no learned table ({conventions.name})")
    return replace(conventions, positions="rope_crop", text_length_fixed=False)


def drop_learned_table(transformer: Any) -> None:
    """Make diffusers' own forward leave the learned table out (`CogVideoXPatchEmbed.forward`)."""
    transformer.patch_embed.use_learned_positional_embeddings = False


def refusal(conventions: Conventions, bucket: Bucket) -> str | None:
    """Why clips of `bucket` cannot be trained, in one line, or None."""
    step = SPATIAL_FACTOR * conventions.patch_size
    if bucket.height % step or bucket.width % step:
        return f"{bucket}: height and width have to be multiples of {step} (VAE factor times patch size)"
    if bucket.frames % TEMPORAL_FACTOR != 1:
        return f"{bucket}: frames have to be {TEMPORAL_FACTOR}k+1, such as 1, 9, 49"
    fixed = conventions.fixed_bucket
    if fixed is not None and bucket != fixed:
        return (
            f"{bucket}: the learned position table of this checkpoint covers only {fixed}; "
            "use that bucket, or drop the table with drop_learned_positions"
        )
    limit = [size * SPATIAL_FACTOR for size in (conventions.sample_height, conventions.sample_width)]
    if conventions.positions == "rope_slice" and (bucket.height > limit[0] or bucket.width > limit[1]):
        return f"{bucket}: the position grid of this checkpoint ends at {limit[0]}x{limit[1]} pixels"
    return None


def _complete(part: str, config: Config, defaults: Config) -> Config:
    """The keys of `defaults` from `config`; raises `UsageError` where a value is of another kind."""
    for key, default in defaults.items():
        value = config.get(key, default)
        if not _is_like(value, default):
            raise UsageError(f"{part} config: {key} is {value!r}, expected something like {default!r}")
    return {**defaults, **config}


def _is_like(value: object, default: object) -> bool:
    """The kind of the default; numbers are positive, and whole where the default is; None stands for a whole number."""
    if value is None or isinstance(value, bool) or isinstance(default, bool):
        return type(value) is type(default)
    if isinstance(default, int | float | None):
        return (
            isinstance(value, int | float) and 0 < value < 1e9 and (isinstance(default, float) or value == int(value))
        )
    return isinstance(value, str) if isinstance(default, str) else isinstance(value, list | tuple)


def _read_positions(transformer: Config) -> Positions:
    """Raises `UsageError` for combinations that no diffusers forward runs."""
    learned, temporal = transformer["use_learned_positional_embeddings"], transformer["patch_size_t"] is not None
    if not transformer["use_rotary_positional_embeddings"]:
        if learned or temporal:
            given = "learned positions" if learned else "patch_size_t"
            raise UsageError(f"transformer config: {given} without use_rotary_positional_embeddings is no CogVideoX")
        return "sincos"
    if temporal:
        if learned:
            raise UsageError("transformer config: patch_size_t with use_learned_positional_embeddings is no CogVideoX")
        return "rope_slice"
    return "rope_crop_learned" if learned else "rope_crop"


def _check(transformer: Config, vae: Config, scheduler: Config) -> None:
    """Raises `UsageError` where the configs contradict each other or this program's geometry."""
    latents, given = vae["latent_channels"], transformer["in_channels"]
    spatial = 2 ** (len(vae["block_out_channels"]) - 1)
    patch = transformer["patch_size"]
    if given not in (latents, 2 * latents):
        raise UsageError(
            f"transformer takes {given} channels, the VAE makes {latents}: expected {latents} (text-to-video) "
            f"or {2 * latents} (image-to-video)"
        )
    if transformer["out_channels"] != latents:
        raise UsageError(f"transformer returns {transformer['out_channels']} channels, the VAE makes {latents}")
    if transformer["ofs_embed_dim"] and given == latents:
        raise UsageError("transformer has an ofs embedding but takes no image condition: no pipeline runs that")
    if vae["temporal_compression_ratio"] != transformer["temporal_compression_ratio"]:
        raise UsageError(
            f"the VAE compresses time {vae['temporal_compression_ratio']} times, "
            f"the transformer expects {transformer['temporal_compression_ratio']}"
        )
    if (vae["temporal_compression_ratio"], spatial) != (TEMPORAL_FACTOR, SPATIAL_FACTOR):
        raise UsageError(
            f"the VAE compresses {vae['temporal_compression_ratio']}x{spatial}x{spatial}, "
            f"CogVideoX {TEMPORAL_FACTOR}x{SPATIAL_FACTOR}x{SPATIAL_FACTOR}"
        )
    if transformer["sample_height"] % patch or transformer["sample_width"] % patch:
        raise UsageError(
            f"transformer config: {transformer['sample_height']}x{transformer['sample_width']} latents "
            f"are not whole patches of {patch}"
        )
    if scheduler["prediction_type"] != "v_prediction":
        raise UsageError(f"scheduler predicts {scheduler['prediction_type']!r}; CogVideoX is trained on 'v_prediction'")

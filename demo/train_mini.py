"""Train the miniature CogVideoX of demo/mini on generated clips: VAE, text encoder, base transformer.

The clips are drawn from fixed seeds; every stage saves checkpoints and goes on where it stopped when the same command
is run again. All stages in order: `.venv/bin/python demo/train_mini.py all`.
"""

import argparse
import io
import math
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import sentencepiece
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSpatialNorm3D
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import T5Config, T5EncoderModel, T5Tokenizer

try:
    from demo import render
except ImportError:  # run as a script: this folder is on the path, its parent is not
    import render  # type: ignore[no-redef]

Bucket = tuple[int, int, int]
"""Frames, height, width in pixels."""

SCENES = render.split_scenes()

ENCODER_STEPS = 700  # 4 whole clips
DECODER_CROP_STEPS = 400  # 4 clips of 9x32x32
DECODER_CLIP_STEPS = 350  # 2 whole clips; one alone takes torch's slow convolution, which needs four times as long
DECODER_STEPS = DECODER_CROP_STEPS + DECODER_CLIP_STEPS
VAE_LEARNING_RATE = 2e-3
LATENT_CHANNELS = 16
LATENT_NOISE = 0.15  # largest standard deviation of the noise that the decoder learns to bear
POSTERIOR_STD = 0.05  # of the encoder's posterior, after scaling
SCALING_FACTOR = 0.7  # latents times this have a standard deviation of 1

TEXT_LENGTH = 16
TEXT_WIDTH = 64

# (frames, height, width): number of clips whose latents the base learns from
BUCKETS = {(9, 64, 64): 6000, (17, 64, 64): 1500, (9, 64, 96): 1500, (17, 64, 96): 1000}
BUCKET_SHARES = (0.55, 0.15, 0.15, 0.15)  # of the steps
HELD_OUT_CLIPS = 200

BASE_STEPS = 2400
BASE_BATCH = 16
BASE_LEARNING_RATE = 2e-3
CAPTION_DROPOUT = 0.05
SNR_SHIFT_SCALE = 1.0
AVERAGE = 0.998  # decay of the weights' moving average


def save_training(
    path: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None = None
) -> None:
    """Write weights, AdamW state, averaged weights and the number of finished steps; replace the file at once."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{name}": value for name, value in state.items()}
    if average:
        tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata={"step": str(step)})
    temporary.replace(path)


def load_training(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None = None
) -> int:
    """Read what `save_training` wrote; return the number of finished steps, 0 without a file."""
    if not path.exists():
        return 0
    tensors = load_file(path)
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    if average:
        average.load_state_dict({name[8:]: value for name, value in tensors.items() if name.startswith("average.")})
    whole = optimizer.state_dict()
    whole["state"] = {}
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, index, field = name.split(".")
            whole["state"].setdefault(int(index), {})[field] = value
    optimizer.load_state_dict(whole)
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["step"])


def learning_rate(step: int, steps: int, peak: float, warm_up: int, floor: float = 0.03) -> float:
    """Return a linear warm-up followed by a cosine down to `floor` times the peak."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def to_model(video: render.Pixels) -> Tensor:
    """Return uint8 [F,H,W,3] as float [3,F,H,W] in -1..1."""
    return torch.from_numpy(video.astype(np.float32) / 127.5 - 1).permute(3, 0, 1, 2)


def to_pixels(video: Tensor) -> render.Array:
    """Return float [3,F,H,W] in -1..1 as [F,H,W,3] in 0..255."""
    return ((video.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 3, 0).numpy()


def make_vae() -> AutoencoderKLCogVideoX:
    """Return an untrained VAE: residual blocks start as identities, upsamplers start close to a smoothing filter."""
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        norm_num_groups=4,
        sample_height=64,
        sample_width=96,
        scaling_factor=SCALING_FACTOR,
    )
    smooth = torch.tensor([1.0, 2.0, 1.0]) / 4
    for name, module in vae.named_modules():
        if name.endswith("conv2") and hasattr(module, "conv"):
            nn.init.zeros_(module.conv.weight)
            nn.init.zeros_(module.conv.bias)
        if "upsamplers" in name and isinstance(module, nn.Conv2d):
            identity = torch.eye(module.out_channels, module.in_channels)
            with torch.no_grad():
                module.weight.mul_(0.3).add_(identity[:, :, None, None] * torch.outer(smooth, smooth))
    return vae


def normalize_early(
    self: CogVideoXSpatialNorm3D, f: Tensor, zq: Tensor, conv_cache: dict[str, Tensor] | None = None
) -> tuple[Tensor, dict[str, None]]:
    """Compute diffusers' spatial norm with the 1x1 convolutions before the upsampling, which gives the same values.

    diffusers upsamples the 16 latent channels to every resolution first; this order saves a fifth of the time.
    """

    def upsample(z: Tensor) -> Tensor:
        frames, size = f.shape[2], f.shape[-2:]
        if frames > 1 and frames % 2 == 1:
            first = functional.interpolate(z[:, :, :1], size=(1, *size))
            return torch.cat([first, functional.interpolate(z[:, :, 1:], size=(frames - 1, *size))], dim=2)
        return functional.interpolate(z, size=(frames, *size))

    scale, shift = self.conv_y.conv(zq), self.conv_b.conv(zq)
    return torch.addcmul(upsample(shift), self.norm_layer(f), upsample(scale)), {"conv_y": None, "conv_b": None}


def vae_bucket(step: int) -> Bucket:
    """Return the shape of the whole clips of a step."""
    return ((9, 64, 64), (9, 64, 64), (9, 64, 96), (17, 64, 64), (9, 64, 64), (9, 64, 96), (17, 64, 96))[step % 7]


def draw_clip(frames: int, height: int, width: int, rng: np.random.Generator) -> Tensor:
    """Return a clip for the VAE, [3,F,H,W] in -1..1."""
    return to_model(render.render(render.draw_any(frames, height, width, rng), height, width))


def crop(video: Tensor, rng: np.random.Generator, size: int = 32) -> Tensor:
    """Return a random square of a clip; its corner lies on the grid of the latents."""
    top, left = (8 * rng.integers((length - size) // 8 + 1) for length in video.shape[2:])
    return video[:, :, top : top + size, left : left + size]


@dataclass(frozen=True)
class Projection:
    """The linear code that defines the latents: 16 numbers for each 8x8 patch of frame 0 and of 4 further frames.

    The numbers are principal components, turned so that all channels vary equally: noise hides them from fine to
    coarse. A VAE trained from scratch repeats itself in many channels, and a small base learns no motion from that.
    """

    first_mean: Tensor
    """[192]"""
    first_basis: Tensor
    """[192,16]"""
    rest_mean: Tensor
    """[768]"""
    rest_basis: Tensor
    """[768,16]"""

    def encode(self, video: Tensor) -> Tensor:
        """Return scaled latents [B,16,f,h,w] of clips [B,3,F,H,W]; every channel has a standard deviation near 1."""
        first = (patches(video[:, :, :1], 1) - self.first_mean) @ self.first_basis
        rest = (patches(video[:, :, 1:], 4) - self.rest_mean) @ self.rest_basis
        return torch.cat([first, rest], dim=1).permute(0, 4, 1, 2, 3)


def patches(video: Tensor, frames: int) -> Tensor:
    """Return the patches of `frames` x8x8 pixels of clips [B,3,F,H,W] as [B,f,h,w,3*frames*64]."""
    split = video.unflatten(4, (-1, 8)).unflatten(3, (-1, 8)).unflatten(2, (-1, frames))
    return split.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def fit_projection(work: Path) -> Projection:
    """Return the principal components of 800 clips, kept in work/projection.safetensors between runs."""
    path = work / "projection.safetensors"
    if not path.exists():
        clips = [base_clip((9, 64, 64), 20_000 + index)[1] for index in range(500)]
        clips += [draw_clip(9, 64, 64, np.random.default_rng([8, index])) for index in range(300)]
        video = torch.stack(clips)
        first, rest = patches(video[:, :, :1], 1).flatten(0, 3), patches(video[:, :, 1:], 4).flatten(0, 3)
        tensors = {}
        for name, rows in (("first", first), ("rest", rest)):
            mean = rows.mean(0)
            centered = rows - mean
            _, vectors = torch.linalg.eigh(centered.T.double() @ centered.double())
            basis = vectors[:, -LATENT_CHANNELS:].float() @ hadamard(LATENT_CHANNELS)
            tensors |= {f"{name}_mean": mean, f"{name}_basis": basis / (centered @ basis).std()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
    return Projection(**load_file(path))


def hadamard(size: int) -> Tensor:
    """Return the orthogonal matrix of entries +-1/sqrt(size); the size is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return matrix / math.sqrt(size)


def train_encoder(work: Path) -> None:
    """Train the VAE's encoder to give the projection's latents and write work/encoder.safetensors."""
    projection, vae = fit_projection(work), make_vae()
    output = vae.encoder.conv_out.conv
    with torch.no_grad():  # the logvar half is constant
        output.weight[LATENT_CHANNELS:].zero_()
        output.bias[LATENT_CHANNELS:].fill_(2 * math.log(POSTERIOR_STD / SCALING_FACTOR))
    optimizer = torch.optim.AdamW(vae.encoder.parameters(), lr=VAE_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    state = work / "encoder_training.safetensors"
    start = load_training(state, vae.encoder, optimizer)
    smoothed = math.nan
    for step in range(start, ENCODER_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, ENCODER_STEPS, VAE_LEARNING_RATE, warm_up=50)
        rng = np.random.default_rng([9, step])
        video = torch.stack([draw_clip(*vae_bucket(step), rng) for _ in range(4)])
        mean = vae.encode(video).latent_dist.mean * SCALING_FACTOR
        loss = ((mean - projection.encode(video)) ** 2).mean()
        update(vae.encoder, optimizer, loss)
        smoothed = loss.item() if math.isnan(smoothed) else 0.96 * smoothed + 0.04 * loss.item()
        if (step + 1) % 25 == 0 or step + 1 == ENCODER_STEPS:
            save_training(state, step + 1, vae.encoder, optimizer)
            report("encoder", step=step + 1, of=ENCODER_STEPS, error=smoothed)
    save_file(vae.encoder.state_dict(), work / "encoder.safetensors")


def train_decoder(work: Path) -> None:
    """Train the VAE's decoder on the projection's latents, a little noisy, and write work/decoder.safetensors."""
    CogVideoXSpatialNorm3D.forward = normalize_early
    projection, vae = fit_projection(work), make_vae()
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=VAE_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    state = work / "decoder_training.safetensors"
    start = load_training(state, vae.decoder, optimizer)
    smoothed = math.nan
    for step in range(start, DECODER_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, DECODER_STEPS, VAE_LEARNING_RATE, warm_up=50)
        rng = np.random.default_rng([10, step])
        if step < DECODER_CROP_STEPS:
            video = torch.stack([crop(draw_clip(9, 64, 64, rng), rng) for _ in range(4)])
        else:
            video = torch.stack([draw_clip(*vae_bucket(step), rng) for _ in range(2)])
        latents = projection.encode(video)
        strength = LATENT_NOISE * torch.from_numpy(rng.random(len(video)).astype(np.float32))
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(step))
        latents = latents + strength[:, None, None, None, None] * noise
        loss, mse = picture_loss(vae.decode(latents / SCALING_FACTOR).sample, video)
        update(vae.decoder, optimizer, loss)
        smoothed = mse if math.isnan(smoothed) else 0.96 * smoothed + 0.04 * mse
        if (step + 1) % 25 == 0 or step + 1 == DECODER_STEPS:
            save_training(state, step + 1, vae.decoder, optimizer)
            report("decoder", step=step + 1, of=DECODER_STEPS, psnr=10 * math.log10(4 / smoothed))
    save_file(vae.decoder.state_dict(), work / "decoder.safetensors")


def picture_loss(decoded: Tensor, video: Tensor) -> tuple[Tensor, float]:
    """Return the loss and the mean squared error in the range -1..1.

    Loss: L1 + MSE + chroma. Chroma is L1 on R-G and G-B, as a gray of the right brightness costs the rest little.
    """
    error = decoded - video
    chroma = (error[:, 0] - error[:, 1]).abs().mean() + (error[:, 1] - error[:, 2]).abs().mean()
    mse = (error**2).mean()
    return error.abs().mean() + mse + chroma, mse.item()


def update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Take one optimizer step with the gradient's norm clipped to 1."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def finish_vae(work: Path) -> AutoencoderKLCogVideoX:
    """Return the trained VAE."""
    vae = make_vae()
    vae.encoder.load_state_dict(load_file(work / "encoder.safetensors"))
    vae.decoder.load_state_dict(load_file(work / "decoder.safetensors"))
    return vae.eval()


def make_tokenizer() -> T5Tokenizer:
    """Return a sentencepiece tokenizer in T5's id layout; each word, and the concept's token, is one piece."""
    captions = render.all_captions()
    words = sorted({word.strip(",") for caption in captions for word in caption.split()} - {render.CONCEPT_TOKEN})
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        vocab_size=150,
        hard_vocab_limit=False,
        user_defined_symbols=[render.CONCEPT_TOKEN, *(f"\N{LOWER ONE EIGHTH BLOCK}{word}" for word in words)],
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    with TemporaryDirectory() as folder:
        Path(folder, "spiece.model").write_bytes(model.getvalue())
        return T5Tokenizer.from_pretrained(folder, model_max_length=TEXT_LENGTH, extra_ids=0)


def make_text_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Return a T5 encoder of one layer with random weights, which stay as they are."""
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config).eval()


def encode_captions(captions: list[str], tokenizer: T5Tokenizer, text_encoder: T5EncoderModel) -> Tensor:
    """Return prompt embeddings [B,L,D] as diffusers' pipeline computes them: padded, without attention mask."""
    tokens = tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return torch.cat([text_encoder(part)[0] for part in tokens.input_ids.split(256)])


def draw_scene(bucket: Bucket, index: int, held_out: bool = False) -> render.Scene:
    """Return the scene of a clip for the base: one to train on, or one kept from training."""
    scenes = SCENES[int(held_out)]
    return scenes[np.random.default_rng([5, *bucket, index, held_out]).integers(len(scenes))]


def base_clip(bucket: Bucket, index: int, held_out: bool = False) -> tuple[render.Scene, Tensor]:
    """Return the scene and the pixels [3,F,H,W] of a clip for the base; the same on every call."""
    rng = np.random.default_rng([2, *bucket, index, held_out])
    scene = draw_scene(bucket, index, held_out)
    frames, height, width = bucket
    return scene, to_model(render.render(render.draw_look(scene, frames, height, width, rng), height, width))


@dataclass(frozen=True)
class Clips:
    """The base's data of one bucket."""

    scenes: list[render.Scene]
    latents: Tensor
    """[N,C,F,H,W], scaled, without the posterior's noise."""


def load_clips(work: Path, bucket: Bucket, held_out: bool = False) -> Clips:
    """Return the clips of a bucket as the projection's latents, kept in work/latents between runs."""
    count = HELD_OUT_CLIPS if held_out else BUCKETS[bucket]
    path = work / "latents" / f"{'x'.join(map(str, bucket))}{'_held_out' * held_out}.safetensors"
    if not path.exists():
        projection = fit_projection(work)
        parts = []
        for first in range(0, count, 50):
            video = torch.stack([base_clip(bucket, index, held_out)[1] for index in range(first, first + 50)])
            parts.append(projection.encode(video))
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"latents": torch.cat(parts)}, path)
        report("latents", frames=bucket[0], width=bucket[2], clips=count)
    return Clips([draw_scene(bucket, index, held_out) for index in range(count)], load_file(path)["latents"])


def make_transformer(width: int = 128, layers: int = 4) -> CogVideoXTransformer3DModel:
    """Return an untrained transformer with the conventions of CogVideoX-2B, whose blocks start as identities."""
    torch.manual_seed(2)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=width // 32,
        attention_head_dim=32,
        num_layers=layers,
        time_embed_dim=64,
        text_embed_dim=TEXT_WIDTH,
        max_text_seq_length=TEXT_LENGTH,
        sample_height=8,
        sample_width=8,
        sample_frames=9,
        spatial_interpolation_scale=1.0,
    )
    for name, module in transformer.named_modules():
        if name.endswith(("norm1.linear", "norm2.linear", "norm_out.linear")) or name == "proj_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer


def make_scheduler() -> CogVideoXDDIMScheduler:
    """Return CogVideoX's noise schedule: zero terminal SNR, velocity, trailing timesteps."""
    return CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=SNR_SHIFT_SCALE,
        timestep_spacing="trailing",
    )


def velocity_loss(
    transformer: CogVideoXTransformer3DModel,
    signal: Tensor,
    latents: Tensor,
    noise: Tensor,
    prompt_embeds: Tensor,
    timesteps: Tensor,
) -> Tensor:
    """Return the mean squared error of the velocity for each clip, [B].

    signal: the schedule's cumulative alphas [1000]. latents and noise: [B,C,F,H,W], scaled.
    """
    alpha = signal[timesteps][:, None, None, None, None]
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    predicted = transformer(noisy.transpose(1, 2), prompt_embeds, timesteps, return_dict=False)[0].transpose(1, 2)
    return ((predicted - velocity) ** 2).mean(dim=(1, 2, 3, 4))


def spread_timesteps(count: int, rng: np.random.Generator) -> Tensor:
    """Return one timestep from each of `count` equal parts of 0..999, in random order."""
    return torch.from_numpy(((rng.permutation(count) + rng.random(count)) * 1000 / count).astype(np.int64))


def train_base(work: Path) -> None:
    """Train the base transformer and write its averaged weights to work/base.safetensors."""
    data = [load_clips(work, bucket) for bucket in BUCKETS]
    held_out = [load_clips(work, bucket, held_out=True) for bucket in BUCKETS]
    tokenizer = make_tokenizer()
    captions = ["", *render.all_captions()]
    row = {caption: index for index, caption in enumerate(captions)}
    embeds = encode_captions(captions, tokenizer, make_text_encoder(tokenizer))
    signal = make_scheduler().alphas_cumprod.float()

    transformer, average = make_transformer(), make_transformer()
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=BASE_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    state = work / "base_training.safetensors"
    start = load_training(state, transformer, optimizer, average)
    smoothed = math.nan
    for step in range(start, BASE_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, BASE_STEPS, BASE_LEARNING_RATE, warm_up=100)
        rng = np.random.default_rng([3, step])
        clips = data[rng.choice(len(data), p=BUCKET_SHARES)]
        loss = batch_loss(transformer, signal, clips, embeds, row, rng, CAPTION_DROPOUT).mean()
        update(transformer, optimizer, loss)
        with torch.no_grad():
            for kept, new in zip(average.parameters(), transformer.parameters(), strict=True):
                kept.lerp_(new, 1 - min(AVERAGE, (step + 1) / (step + 10)))
        smoothed = loss.item() if math.isnan(smoothed) else 0.99 * smoothed + 0.01 * loss.item()
        if (step + 1) % 250 == 0 or step + 1 == BASE_STEPS:
            save_training(state, step + 1, transformer, optimizer, average)
            checks = [held_out_loss(average, signal, clips, embeds, row) for clips in held_out]
            report("base", step=step + 1, of=BASE_STEPS, loss=smoothed, held_out=sum(checks) / len(checks))
    save_file(average.state_dict(), work / "base.safetensors")


def batch_loss(
    transformer: CogVideoXTransformer3DModel,
    signal: Tensor,
    clips: Clips,
    embeds: Tensor,
    row: dict[str, int],
    rng: np.random.Generator,
    dropout: float,
) -> Tensor:
    """Return the losses [B] of a batch drawn from `clips`: clips, captions, timesteps and noise come from `rng`."""
    chosen = rng.integers(len(clips.scenes), size=BASE_BATCH)
    rows = [row["" if rng.random() < dropout else render.describe(clips.scenes[i], rng)] for i in chosen]
    mean = clips.latents[torch.from_numpy(chosen)]
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    latents = mean + POSTERIOR_STD * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    return velocity_loss(transformer, signal, latents, noise, embeds[rows], spread_timesteps(BASE_BATCH, rng))


def held_out_loss(
    transformer: CogVideoXTransformer3DModel, signal: Tensor, clips: Clips, embeds: Tensor, row: dict[str, int]
) -> float:
    """Return the mean loss of four batches of held-out clips; the same draws on every call."""
    with torch.no_grad():
        batches = [
            batch_loss(transformer, signal, clips, embeds, row, np.random.default_rng([4, number]), 0.0)
            for number in range(4)
        ]
    return float(torch.cat(batches).mean())


def export(work: Path, folder: Path) -> None:
    """Write the miniature in the hub's folder layout, weights in fp16."""
    transformer = make_transformer()
    transformer.load_state_dict(load_file(work / "base.safetensors"))
    tokenizer = make_tokenizer()
    pipeline = CogVideoXPipeline(
        tokenizer, make_text_encoder(tokenizer), finish_vae(work), transformer, make_scheduler()
    )
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)


def report(stage: str, **figures: float) -> None:
    """Print one line of figures with the CPU seconds of this process."""
    words = " ".join(f"{name}={value:.4g}" for name, value in figures.items())
    print(f"{stage} {words} cpu_s={time.process_time():.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["encoder", "decoder", "base", "export", "all"])
    parser.add_argument("--work", type=Path, default=Path("runs/mini"), help="checkpoints and latents")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "mini")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stages = {"encoder": train_encoder, "decoder": train_decoder, "base": train_base}
    for name, train in stages.items():
        if options.stage in (name, "all"):
            train(options.work)
    if options.stage in ("export", "all"):
        export(options.work, options.output)


if __name__ == "__main__":
    main()

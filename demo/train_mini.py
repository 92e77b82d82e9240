"""Train the miniature CogVideoX of demo/mini on generated clips: VAE, text encoder, base transformer.

The clips are drawn from fixed seeds; every stage saves checkpoints and goes on where it stopped when the same command
is run again. All stages in order: `.venv/bin/python demo/train_mini.py all`.
"""

import argparse
import io
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import sentencepiece
import torch
import torch.multiprocessing
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSpatialNorm3D
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.nn import functional
from transformers import T5Config, T5EncoderModel, T5Tokenizer

try:
    from demo import render
except ImportError:  # run as a script: this folder is on the path, its parent is not
    import render  # type: ignore[no-redef]

Bucket = tuple[int, int, int]
"""Frames, height, width in pixels."""

PORTS = {"encoder": 29601, "decoder": 29602, "vae": 29604, "base": 29603}

SCENES = render.split_scenes()

ENCODER_CROP_STEPS = 500  # 4 clips of 9x32x32
ENCODER_CLIP_STEPS = 150  # 4 whole clips
ENCODER_STEPS = ENCODER_CROP_STEPS + ENCODER_CLIP_STEPS
DECODER_CROP_STEPS = 400  # 4 clips of 9x32x32
DECODER_CLIP_STEPS = 150  # 4 whole clips
DECODER_STEPS = DECODER_CROP_STEPS + DECODER_CLIP_STEPS
VAE_CROP_STEPS = 1100  # encoder and decoder together: 4 clips of 9x32x32
VAE_CLIP_STEPS = 280  # 4 whole clips
VAE_STEPS = VAE_CROP_STEPS + VAE_CLIP_STEPS
VAE_LEARNING_RATE = 2e-3
VAE_JOINT_LEARNING_RATE = 6e-4
ANCHOR = 0.3  # weight of the encoder's distance to the projection while both train
VAE_PARTS = 2  # of a batch; a process takes its parts in turn, so the number of processes changes only rounding
BASE_PARTS = 2
LATENT_CHANNELS = 16
LATENT_NOISE = 0.15  # largest standard deviation of the noise that the decoder learns to bear
POSTERIOR_STD = 0.05  # of the encoder's posterior, after scaling
SCALING_FACTOR = 0.7  # latents times this have a standard deviation of 1

TEXT_LENGTH = 16
TEXT_WIDTH = 64

# (frames, height, width): number of clips whose latents the base learns from
BUCKETS = {(9, 64, 64): 5000, (17, 64, 64): 1000, (9, 64, 96): 1000, (17, 64, 96): 500}
BUCKET_SHARES = (0.64, 0.12, 0.12, 0.12)  # of the steps
HELD_OUT_CLIPS = 200

BASE_STEPS = 2000
BASE_BATCH = 16
BASE_LEARNING_RATE = 2e-3
CAPTION_DROPOUT = 0.05
SNR_SHIFT_SCALE = 1.0
AVERAGE = 0.998  # decay of the weights' moving average


def save_training(
    path: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None = None
) -> None:
    """Write weights, AdamW state, averaged weights and the number of finished steps; replace the file at once.

    Of several processes the first writes.
    """
    if is_shared() and distributed.get_rank():
        return
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


def learning_rate(step: int, steps: int, peak: float, warm_up: int) -> float:
    """Return a linear warm-up, a plateau, and a linear fall to 3 % over the last 30 % of the steps.

    A plateau leaves the number of steps open until the fall begins.
    """
    left = (steps - step) / (0.3 * steps)
    return peak * min(1.0, (step + 1) / warm_up, max(0.03, left))


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


def draw_pair(step: int, part: int, crops: bool) -> Tensor:
    """Return one part of a batch for the VAE, two crops of 9x32x32 or two whole clips, [2,3,F,H,W].

    Two, because torch takes a convolution that is four times slower for one clip alone.
    """
    rng = np.random.default_rng([1, step, part])
    if crops:
        return torch.stack([crop(draw_clip(9, 64, 64, rng), rng) for _ in range(2)])
    return torch.stack([draw_clip(*vae_bucket(step), rng) for _ in range(2)])


def draw_clip(frames: int, height: int, width: int, rng: np.random.Generator) -> Tensor:
    """Return a clip for the VAE, [3,F,H,W] in -1..1: a scene of the base or, as often, anything."""
    if rng.random() < 0.5:
        scene = SCENES[0][rng.integers(len(SCENES[0]))]
        return to_model(render.render(render.draw_look(scene, frames, height, width, rng), height, width))
    return to_model(render.render(render.draw_any(frames, height, width, rng), height, width))


def crop(video: Tensor, rng: np.random.Generator, size: int = 32) -> Tensor:
    """Return a random square of a clip; its corner lies on the grid of the latents."""
    top, left = (8 * rng.integers((length - size) // 8 + 1) for length in video.shape[2:])
    return video[:, :, top : top + size, left : left + size]


@dataclass(frozen=True)
class Projection:
    """The linear code that defines the latents: 16 numbers for each 8x8 patch of frame 0 and of 4 further frames.

    The numbers are principal components, the large ones made smaller, then turned so that all channels vary equally:
    noise hides the fine ones first. A VAE trained from scratch repeats itself in many channels, and a small
    base learns no motion from that.
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
        tensors, bases, spreads = {}, [], []
        for name, rows in (("first", first), ("rest", rest)):
            mean = rows.mean(0)
            centered = rows - mean
            _, vectors = torch.linalg.eigh(centered.T.double() @ centered.double())
            basis = vectors[:, -LATENT_CHANNELS:].float()
            variance = (centered @ basis).var(0)
            bases.append(basis / variance.mean().sqrt())
            spreads.append((variance / variance.mean()).sqrt())
            tensors[f"{name}_mean"] = mean
        # Half-way to whitening: without it four fifths of the variance is the ground's brightness.
        spread = (spreads[0] + spreads[1]) / 2
        turn = (spread**-0.5 / spread.mean().sqrt()).diag() @ hadamard(LATENT_CHANNELS)
        tensors |= {"first_basis": bases[0] @ turn, "rest_basis": bases[1] @ turn}
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
    prepare_encoder(vae)
    optimizer = torch.optim.AdamW(vae.encoder.parameters(), lr=VAE_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    state = work / "encoder_training.safetensors"
    start = load_training(state, vae.encoder, optimizer)
    smoothed = math.nan
    for step in range(start, ENCODER_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, ENCODER_STEPS, VAE_LEARNING_RATE, warm_up=50)
        loss = take_step(vae.encoder, optimizer, VAE_PARTS, partial(encoder_loss, vae, projection, step))
        smoothed = loss if math.isnan(smoothed) else 0.96 * smoothed + 0.04 * loss
        if (step + 1) % 25 == 0 or step + 1 == ENCODER_STEPS:
            save_training(state, step + 1, vae.encoder, optimizer)
            report("encoder", step=step + 1, of=ENCODER_STEPS, error=smoothed)
    save_file(vae.encoder.state_dict(), work / "encoder.safetensors")


def prepare_encoder(vae: AutoencoderKLCogVideoX) -> None:
    """Set a constant posterior variance, and start the encoder close to a linear map, which the projection is.

    The convolutions outside the residual branches keep the signal's size and add no bias. Group norm divides by the
    spread of a clip's features; two constant channels of four make that nearly a constant.
    """
    output, last = vae.encoder.conv_out.conv, vae.encoder.mid_block.resnets[-1]
    spread: list[Tensor] = []
    hook = last.register_forward_hook(lambda module, inputs, result: spread.append(result[0].std()))
    outside = [vae.encoder.conv_in.conv]
    outside += [
        module for name, module in vae.encoder.named_modules() if name.endswith(("shortcut", "downsamplers.0.conv"))
    ]
    for module in outside:
        nn.init.orthogonal_(module.weight)
        nn.init.zeros_(module.bias)
    with torch.no_grad():
        output.weight[LATENT_CHANNELS:].zero_()
        output.bias[LATENT_CHANNELS:].fill_(2 * math.log(POSTERIOR_STD / SCALING_FACTOR))
        vae.encode(draw_pair(0, 0, crops=False))
        last.conv2.conv.bias[0::4] = 1.5 * spread[0]
        last.conv2.conv.bias[1::4] = -1.5 * spread[0]
    hook.remove()


def encoder_loss(vae: AutoencoderKLCogVideoX, projection: Projection, step: int, part: int) -> Tensor:
    """Return the mean squared error of the encoder's scaled latents against the projection's."""
    video = draw_pair(step, part, crops=step < ENCODER_CROP_STEPS)
    mean = vae.encode(video).latent_dist.mean * SCALING_FACTOR
    return ((mean - projection.encode(video)) ** 2).mean()


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
        loss = take_step(vae.decoder, optimizer, VAE_PARTS, partial(decoder_loss, vae, projection, step))
        smoothed = loss if math.isnan(smoothed) else 0.96 * smoothed + 0.04 * loss
        if (step + 1) % 25 == 0 or step + 1 == DECODER_STEPS:
            save_training(state, step + 1, vae.decoder, optimizer)
            report("decoder", step=step + 1, of=DECODER_STEPS, loss=smoothed)
    save_file(vae.decoder.state_dict(), work / "decoder.safetensors")


def decoder_loss(vae: AutoencoderKLCogVideoX, projection: Projection, step: int, part: int) -> Tensor:
    """Return the error of clips decoded from the projection's latents."""
    rng = np.random.default_rng([10, step, part])
    video = draw_pair(step, part, crops=step < DECODER_CROP_STEPS)
    latents = projection.encode(video)
    strength = LATENT_NOISE * torch.from_numpy(rng.random(len(video)).astype(np.float32))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(VAE_PARTS * step + part))
    latents = latents + strength[:, None, None, None, None] * noise
    return picture_loss(vae.decode(latents / SCALING_FACTOR).sample - video)


def train_vae(work: Path) -> None:
    """Train encoder and decoder together, from work/encoder.safetensors and work/decoder.safetensors, and replace both.

    The encoder stays near the projection, because the base generates the projection's latents.
    """
    CogVideoXSpatialNorm3D.forward = normalize_early
    projection, vae = fit_projection(work), finish_vae(work).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_JOINT_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    state = work / "vae_training.safetensors"
    start = load_training(state, vae, optimizer)
    smoothed = math.nan
    for step in range(start, VAE_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, VAE_STEPS, VAE_JOINT_LEARNING_RATE, warm_up=50)
        loss = take_step(vae, optimizer, VAE_PARTS, partial(vae_loss, vae, projection, step))
        smoothed = loss if math.isnan(smoothed) else 0.96 * smoothed + 0.04 * loss
        if (step + 1) % 25 == 0 or step + 1 == VAE_STEPS:
            save_training(state, step + 1, vae, optimizer)
            report("vae", step=step + 1, of=VAE_STEPS, loss=smoothed)
    save_file(vae.encoder.state_dict(), work / "encoder.safetensors")
    save_file(vae.decoder.state_dict(), work / "decoder.safetensors")


def vae_loss(vae: AutoencoderKLCogVideoX, projection: Projection, step: int, part: int) -> Tensor:
    """Return the loss of two clips: one decoded from the encoder's latents, one from the projection's with noise."""
    rng = np.random.default_rng([11, step, part])
    video = draw_pair(10_000 + step, part, crops=step < VAE_CROP_STEPS)
    exact = projection.encode(video)
    encoded = vae.encode(video).latent_dist.mean * SCALING_FACTOR
    noise = torch.randn(exact[:1].shape, generator=torch.Generator().manual_seed(VAE_PARTS * step + part))
    latents = torch.cat([encoded[:1], exact[1:] + LATENT_NOISE * float(rng.random()) * noise])
    decoded = vae.decode(latents / SCALING_FACTOR).sample
    return picture_loss(decoded - video) + ANCHOR * ((encoded - exact) ** 2).mean()


def picture_loss(error: Tensor) -> Tensor:
    """Return L1 + MSE + chroma of an error [B,3,F,H,W]; chroma is L1 on R-G and G-B.

    Without chroma, a gray of the right brightness stands for weak colors.
    """
    chroma = (error[:, 0] - error[:, 1]).abs().mean() + (error[:, 1] - error[:, 2]).abs().mean()
    return error.abs().mean() + (error**2).mean() + chroma


def my_parts(count: int) -> range:
    """Return which of `count` parts of a batch fall to this process."""
    return range(count)[distributed.get_rank() :: distributed.get_world_size()] if is_shared() else range(count)


def is_shared() -> bool:
    """Return whether several processes train together."""
    return distributed.is_available() and distributed.is_initialized()


def take_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, parts: int, loss_of: Callable[[int], Tensor]
) -> float:
    """Take one optimizer step on the mean loss of all parts, the gradient's norm clipped to 1; return that loss."""
    optimizer.zero_grad()
    total = torch.zeros(1)
    for part in my_parts(parts):
        loss = loss_of(part) / parts
        loss.backward()
        total += loss.detach()
    gradients = [value.grad for value in model.parameters() if value.grad is not None]
    if is_shared():
        flat = torch.cat([total, *(gradient.flatten() for gradient in gradients)])
        distributed.all_reduce(flat)
        pieces = flat.split([1, *(gradient.numel() for gradient in gradients)])
        total = pieces[0]
        for gradient, piece in zip(gradients, pieces[1:], strict=True):
            gradient.copy_(piece.view_as(gradient))
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return total.item()


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
        save_file({"latents": torch.cat(parts).contiguous()}, path)
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


def share_out(jobs: list[Callable[[], object]]) -> None:
    """Call each job in one of the processes and wait for all."""
    if not is_shared():
        return
    for job in jobs[distributed.get_rank() :: distributed.get_world_size()]:
        job()
    distributed.barrier()


def train_base(work: Path) -> None:
    """Train the base transformer and write its averaged weights to work/base.safetensors."""
    share_out([partial(load_clips, work, bucket) for bucket in BUCKETS])
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
        clips = data[np.random.default_rng([3, step]).choice(len(data), p=BUCKET_SHARES)]
        loss = take_step(
            transformer, optimizer, BASE_PARTS, partial(base_loss, transformer, signal, clips, embeds, row, step)
        )
        with torch.no_grad():
            for kept, new in zip(average.parameters(), transformer.parameters(), strict=True):
                kept.lerp_(new, 1 - min(AVERAGE, (step + 1) / (step + 10)))
        smoothed = loss if math.isnan(smoothed) else 0.98 * smoothed + 0.02 * loss
        if (step + 1) % 50 == 0 or step + 1 == BASE_STEPS:
            save_training(state, step + 1, transformer, optimizer, average)
            checks = [held_out_loss(average, signal, clips, embeds, row) for clips in held_out]
            report("base", step=step + 1, of=BASE_STEPS, loss=smoothed, held_out=sum(checks) / len(checks))
    save_file(average.state_dict(), work / "base.safetensors")


def base_loss(
    transformer: CogVideoXTransformer3DModel,
    signal: Tensor,
    clips: Clips,
    embeds: Tensor,
    row: dict[str, int],
    step: int,
    part: int,
) -> Tensor:
    """Return the loss of one part of a training batch."""
    rng = np.random.default_rng([3, step, part])
    return batch_loss(transformer, signal, clips, embeds, row, rng, CAPTION_DROPOUT, BASE_BATCH // BASE_PARTS).mean()


def batch_loss(
    transformer: CogVideoXTransformer3DModel,
    signal: Tensor,
    clips: Clips,
    embeds: Tensor,
    row: dict[str, int],
    rng: np.random.Generator,
    dropout: float,
    count: int,
) -> Tensor:
    """Return the losses [B] of `count` clips drawn from `clips`: captions, timesteps and noise are drawn too."""
    chosen = rng.integers(len(clips.scenes), size=count)
    rows = [row["" if rng.random() < dropout else render.describe(clips.scenes[i], rng)] for i in chosen]
    mean = clips.latents[torch.from_numpy(chosen)]
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    latents = mean + POSTERIOR_STD * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    return velocity_loss(transformer, signal, latents, noise, embeds[rows], spread_timesteps(count, rng))


def held_out_loss(
    transformer: CogVideoXTransformer3DModel, signal: Tensor, clips: Clips, embeds: Tensor, row: dict[str, int]
) -> float:
    """Return the mean loss of four batches of held-out clips; the same draws on every call."""
    with torch.no_grad():
        batches = [
            batch_loss(transformer, signal, clips, embeds, row, np.random.default_rng([4, number]), 0.0, 16)
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
    if not is_shared() or distributed.get_rank() == 0:
        print(f"{stage} {words} cpu_s={time.process_time():.0f}", flush=True)


STAGES = {"encoder": train_encoder, "decoder": train_decoder, "vae": train_vae, "base": train_base}


def run_stage(rank: int, stage: str, work: Path, processes: int) -> None:
    """Run a stage of training as one of several processes, each with one thread."""
    torch.set_num_threads(1)
    if processes > 1:
        store = distributed.TCPStore("127.0.0.1", PORTS[stage], processes, is_master=rank == 0)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    STAGES[stage](work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=[*STAGES, "export", "all"])
    parser.add_argument("--work", type=Path, default=Path("runs/mini"), help="checkpoints and latents")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "mini")
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    options = parser.parse_args()
    for stage in STAGES:
        if options.stage in (stage, "all"):
            arguments = (stage, options.work, options.processes)
            torch.multiprocessing.spawn(run_stage, args=arguments, nprocs=options.processes)
    if options.stage in ("export", "all"):
        export(options.work, options.output)


if __name__ == "__main__":
    main()

"""A plain end-to-end trainer, the place to start reading: diffusers' modules, its scheduler and its loss.

It does in one loop what the packages do in two stages: decode, encode with the VAE and T5, add noise, predict, take the
loss, update the adapter. VAE and T5 stay loaded throughout. The benchmarks compare stage 2 with it.
"""

from collections.abc import Callable
from itertools import cycle, islice

import av
import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from peft import LoraConfig
from torch.nn import functional
from transformers import AutoTokenizer, T5EncoderModel

from shared.config import Config


def train_plainly(config: Config, polled: Callable[[], object]) -> None:
    """Train for ever; call `polled` in every step, between gradients and update, as `precog train` polls its signal."""
    folder, data, train = config.model.pretrained_model_name_or_path, config.data, config.train
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/tokenizer")
    text_encoder = T5EncoderModel.from_pretrained(f"{folder}/text_encoder").requires_grad_(False).eval()
    vae = AutoencoderKLCogVideoX.from_pretrained(f"{folder}/vae").requires_grad_(False).eval()
    transformer = CogVideoXTransformer3DModel.from_pretrained(f"{folder}/transformer").requires_grad_(False)
    scheduler = CogVideoXDPMScheduler.from_pretrained(f"{folder}/scheduler")
    transformer.add_adapter(
        LoraConfig(r=train.lora_rank, lora_alpha=train.lora_alpha, target_modules=list(train.lora_target_modules))
    )
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=train.learning_rate)
    names = (data.video_column, data.caption_column)
    videos, captions = ((data.instance_data_root / name).read_text(encoding="utf-8").split("\n") for name in names)
    posteriors = []
    for video in filter(None, videos):
        with av.open(str(data.instance_data_root / video)) as container:
            decoded = islice(container.decode(video=0), data.max_num_frames)
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
        pixels = functional.interpolate(pixels, data.resolutions[0], mode="bicubic", antialias=True)
        with torch.no_grad():
            posteriors.append(vae.encode(pixels.transpose(0, 1)[None]).latent_dist)
    torch.manual_seed(train.seed)
    for index in cycle(range(len(posteriors))):
        latents = (posteriors[index].sample() * vae.config.scaling_factor).permute(0, 2, 1, 3, 4)
        tokens = tokenizer(captions[index], padding="max_length", truncation=True, return_tensors="pt")
        with torch.no_grad():
            prompt_embeds = text_encoder(tokens.input_ids)[0]
        noise = torch.randn_like(latents)
        timestep = torch.randint(0, 1000, (1,))
        noisy = scheduler.add_noise(latents, noise, timestep)
        output = transformer(
            hidden_states=noisy, encoder_hidden_states=prompt_embeds, timestep=timestep, return_dict=False
        )[0]
        x0 = scheduler.get_velocity(output, noisy, timestep)
        weight = 1 / (1 - scheduler.alphas_cumprod[timestep])
        loss = (weight.view(-1, 1, 1, 1, 1) * (x0 - latents) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
        polled()
        optimizer.step()
        optimizer.zero_grad()

"""Twenty steps of diffusers' unmodified `train_cogvideox_lora.py`, repeated draw by draw by our own step.

The numbers are recorded, see tests/golden/README.md for what they are and how to renew them.
"""

import logging
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from precompute.encoders import TextEncoder, VaeEncoder, load_tokenizer
from precompute.pixels import to_clip
from shared.config import Config, Data, Model, Precompute, Train
from shared.model.conventions import Conventions, read_conventions
from shared.model.geometry import Bucket
from shared.model.pretrained import pretrained_part, read_config
from train.data.example import Example, ModelInput, pad_front
from train.objective import NoiseSchedule, add_noise, read_schedule, velocity
from train.optimizer import build_optimizer
from train.step import accumulate_gradients, finish_gradients
from train.transformer.engine import Engine
from train.transformer.load import adapter_weights, load_adapter_weights, load_transformer

GOLDEN = Path(__file__).parents[1] / "golden"
PIPELINE = GOLDEN / "tiny-cogvideox"
CPU = torch.device("cpu")
RELATIVE = 1e-5
"""Of losses, norms and moments as they are; of a final weight tensor in the L2 norm.

Adam divides by the square root of what may be a few ulp, so single elements carry the processor's rounding: the
recording's own worst element is 1.08e-5 of its tensor's largest from a float64 run, its worst tensor 1.7e-6.
"""
logger = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(GOLDEN / "reference_t2v.safetensors")


@pytest.fixture(scope="module")
def conventions() -> Conventions:
    transformer, vae = (read_config(PIPELINE / part / "config.json") for part in ("transformer", "vae"))
    return read_conventions(transformer, vae, read_config(PIPELINE / "scheduler" / "scheduler_config.json"))


def golden_config() -> Config:
    return Config(
        model=Model(pretrained_model_name_or_path=str(PIPELINE)),
        data=Data(name="golden", instance_data_root=GOLDEN),
        precompute=Precompute(cache="unused"),
        train=Train(
            output_dir=Path("unused"),
            lora_rank=4,
            lora_alpha=4,
            learning_rate=1e-3,
            optimizer="adam",
            max_grad_norm=1.0,
            mixed_precision="fp32",
        ),
    )


def recorded_example(
    recorded: dict[str, Tensor], step: int, conventions: Conventions, schedule: NoiseSchedule
) -> Example:
    clip, timestep = int(recorded[f"step{step:02}.clip"]), recorded[f"step{step:02}.timestep"][0]
    latents, noise = (recorded[f"step{step:02}.{name}"][0] for name in ("latents", "noise"))
    latents = pad_front(latents, conventions)
    noisy = add_noise(latents, noise, timestep, schedule)
    model_input = ModelInput(noisy, recorded[f"clip{clip}.prompt_embeds"], timestep)
    return Example(model_input, velocity(latents, noise, timestep, schedule), f"clip {clip}", str(step))


def test_losses_norms_and_weights_are_the_reference_scripts(
    recorded: dict[str, Tensor], conventions: Conventions
) -> None:
    config = golden_config()
    accelerator = Accelerator(cpu=True)
    transformer = load_transformer(config).train()
    schedule = read_schedule(read_config(PIPELINE / "scheduler" / "scheduler_config.json"))
    load_adapter_weights(transformer, adapter_at("init", recorded))
    named = [(name, value) for name, value in transformer.named_parameters() if value.requires_grad]
    optimizer = build_optimizer(named, config.train)
    worst_loss = worst_norm = 0.0
    for step in range(20):
        example = recorded_example(recorded, step, conventions, schedule).to(CPU, transformer.dtype)
        losses = accumulate_gradients(transformer, [[example]], conventions, config.train, Engine())
        result = finish_gradients([value for _, value in named], losses, accelerator, config.train, stopping=False)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        worst_loss = max(worst_loss, relative(result.loss, recorded[f"step{step:02}.loss"]))
        worst_norm = max(worst_norm, relative(result.grad_norm, recorded[f"step{step:02}.grad_norm"]))
    worst_weight = max(
        float((weights - expected).norm() / expected.norm())
        for weights, expected in paired(adapter_weights(transformer), adapter_at("final", recorded))
    )
    worst = {"loss": worst_loss, "gradient norm": worst_norm, "weights": worst_weight}
    logger.info("worst relative differences %s", worst)
    assert max(worst.values()) < RELATIVE, worst


def test_moments_of_the_recorded_pixels_are_the_reference_scripts(recorded: dict[str, Tensor]) -> None:
    model = Model(pretrained_model_name_or_path=str(PIPELINE))
    encoder = VaeEncoder(pretrained_part(model, "vae"), Precompute(cache="unused", vae_dtype="fp32"), CPU)
    for clip in range(8):
        pixels = recorded[f"clip{clip}.pixels"].permute(0, 2, 3, 1)  # [F,H,W,C], as they are decoded
        clips = to_clip(pixels, Bucket(17, 64, 96), flip=False)
        moments = encoder.encode(clips[None])[0]
        torch.testing.assert_close(moments, recorded[f"clip{clip}.moments"], rtol=RELATIVE, atol=RELATIVE)


def test_prompt_embeds_of_the_captions_are_the_reference_scripts(
    recorded: dict[str, Tensor], conventions: Conventions
) -> None:
    model = Model(pretrained_model_name_or_path=str(PIPELINE))
    tokenizer = load_tokenizer(str(PIPELINE / "tokenizer"))
    encoder = TextEncoder(
        pretrained_part(model, "text_encoder"),
        tokenizer,
        Precompute(cache="unused", text_dtype="fp32"),
        CPU,
        conventions.text_length,
    )
    captions = (GOLDEN / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert len(captions) == 8
    for clip, embeds in enumerate(encoder.encode(captions)):
        torch.testing.assert_close(embeds, recorded[f"clip{clip}.prompt_embeds"], rtol=RELATIVE, atol=RELATIVE)


def adapter_at(when: str, recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"lora_{when}."
    return {name.removeprefix(prefix): value for name, value in recorded.items() if name.startswith(prefix)}


def paired(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    assert ours.keys() == theirs.keys()
    return [(ours[name].detach(), theirs[name]) for name in theirs]


def relative(ours: float, theirs: Tensor) -> float:
    return abs(ours - float(theirs)) / abs(float(theirs))

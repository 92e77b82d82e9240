"""Every variant through both stages: precompute, train on two clips, export, sample. Tiny random models, real mp4s."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, DiffusionPipeline
from torch import Tensor

from shared.config import Config
from shared.errors import UsageError
from shared.model.geometry import Bucket
from shared.run_folder import read_metrics
from shared.signals import StopSignal
from tests.experiments import CAPTIONS, FRAMES, HEIGHT, WIDTH, fill_cache, write_experiment
from tests.media import draw
from tests.tiny import TEXT_LENGTH, VARIANTS
from train.checkpoint.files import latest_checkpoint
from train.evaluate import held_out_loss
from train.loop import train
from train.open_run import open_run
from train.run import Run
from train.transformer.load import load_adapter_weights

LORA = {
    "lora_rank": 32,
    "lora_alpha": 32,
    "learning_rate": 5e-3,
    "lora_target_modules": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_out"),
    "checkpointing_steps": 1000,
    "max_train_steps": 40,
}
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trained:
    """An experiment that ran, with its velocity loss on the training clips before and after (fixed noise)."""

    config: Config
    run: Run
    before: float
    after: float


def run_both_stages(variant: str, folder: Path, settings: dict[str, object]) -> Trained:
    config = write_experiment(variant, folder, **settings)
    fill_cache(config)
    run = open_run(config)
    before = held_in_loss(run)
    train_to_its_end(config)
    checkpoint = latest_checkpoint(config.train.output_dir, report=pytest.fail)
    assert checkpoint is not None
    load_adapter_weights(run.transformer, checkpoint.tensors["adapter"])
    after = held_in_loss(run)
    logger.info("%s: %.4f -> %.4f (-%.0f%%)", variant, before, after, 100 * (1 - after / before))
    return Trained(config, run, before, after)


def train_to_its_end(config: Config) -> None:
    with StopSignal() as stop:
        train(config, stop)


def held_in_loss(run: Run) -> float:
    found = held_out_loss(replace(run, held_out=run.dataset), stopped=lambda: False)
    assert found is not None
    return found[0]


@pytest.mark.parametrize(
    "variant",
    [name if name in ("2b", "1.5-5b-i2v") else pytest.param(name, marks=pytest.mark.faults) for name in VARIANTS],
)
def test_training_lowers_the_loss_and_moves_samples_towards_the_clip(variant: str, tmp_path: Path) -> None:
    trained = run_both_stages(variant, tmp_path, LORA)
    assert len(trained.run.dataset.rows) == 2
    assert trained.after < 0.85 * trained.before
    if variant == "5b":
        return  # its samples are already near
    pipeline = DiffusionPipeline.from_pretrained(trained.config.model.pretrained_model_name_or_path)
    pipeline.set_progress_bar_config(disable=True)
    clip = stored_latents(trained)
    base = distance(sample(pipeline), clip)
    pipeline.load_lora_weights(trained.config.train.output_dir / "export")
    adapted = distance(sample(pipeline), clip)
    logger.info("%s: latent distance %.3f -> %.3f", variant, base, adapted)
    assert adapted < 0.9 * base


def stored_latents(trained: Trained) -> Tensor:
    """[F,C,H,W] of the clip whose caption is the first one, padded as the sampler has it."""
    rows = [row.captions for row in trained.run.dataset.rows]
    return trained.run.dataset.fixed_example(rows.index(CAPTIONS[:1]), 999).target.neg()  # v = -x0 where abar is 0


def sample(pipeline: CogVideoXPipeline | CogVideoXImageToVideoPipeline) -> Tensor:
    image = {"image": first_frame()} if isinstance(pipeline, CogVideoXImageToVideoPipeline) else {}
    result: Tensor = pipeline(
        prompt=CAPTIONS[0],
        num_frames=FRAMES,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=10,
        guidance_scale=1.0,
        max_sequence_length=TEXT_LENGTH,
        output_type="latent",
        generator=torch.Generator().manual_seed(5),
        **image,
    ).frames[0]
    return result


def first_frame() -> Tensor:
    """[1,3,H,W] in [0, 1]."""
    return torch.from_numpy(draw(0, HEIGHT, WIDTH).astype(np.float32) / 255).permute(2, 0, 1)[None]


def distance(sampled: Tensor, clip: Tensor) -> float:
    """Root mean square."""
    assert sampled.shape == clip.shape
    return float((sampled - clip).square().mean().sqrt())


def test_learned_table_refuses_other_shapes_and_can_be_dropped(tmp_path: Path) -> None:
    config = write_experiment("5b-i2v", tmp_path, max_train_steps=3)
    other = config.data.model_copy(update={"resolution_buckets": ((64, 64),), "frame_buckets": (5,)})
    config = config.model_copy(update={"data": other})
    reason = "5x64x64: the learned position table of this checkpoint covers only 9x64x96"
    with pytest.raises(UsageError, match=f"{reason}; use that bucket or set model.drop_learned_positions=true"):
        fill_cache(config)
    dropped = config.model_copy(update={"model": config.model.model_copy(update={"drop_learned_positions": True})})
    fill_cache(dropped)
    with pytest.raises(UsageError, match=reason):
        open_run(config)
    train_to_its_end(dropped)
    run = open_run(dropped)
    assert {row.bucket for row in run.dataset.rows} == {Bucket(5, 64, 64)}
    assert run.conventions.positions == "rope_crop"
    lines = read_metrics(dropped.train.output_dir)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(np.isfinite(line["loss"]) for line in lines)

"""The trained miniature guards the trainer: 60 steps on the demo's clips must lower the loss of unseen clips.

The loss is taken twice: by the run on its held-out clips, and here, by diffusers alone, on clips that no file holds.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from PIL import Image, ImageSequence

from demo import render
from precompute.run import precompute
from sample.export import export_run
from shared.cache.view import open_view
from shared.config import Config
from shared.config_file import load_config
from shared.latent_rgb import latent_pictures
from shared.run_folder import read_metrics
from shared.signals import StopSignal
from tests.train import processes
from train.loop import train

pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).parents[1]
MINIATURE = ROOT / "demo" / "mini"
STEPS = 60
BASE_LOSS = 0.2938
"""Of the run's held-out clips without an adapter; renew it when weights, noise or keys of clips change."""
PREVIEWED = {
    "a red ball moves left on snow": ("red", "left", "snow"),
    "a blue box moves right on coal": ("blue", "right", "coal"),
}
"""Prompts of previews -> color, motion and ground to be seen; growth is too fine for a latent's 8x8 pixels."""
UNSEEN_ZORPS = 6
TIMESTEPS = (100, 300, 500, 700, 900)


def config_in(folder: Path, run: str, *overrides: str) -> Config:
    """Return the demo's config with short training; alpha differs from the rank, so that it counts."""
    places = {
        "model.pretrained_model_name_or_path": MINIATURE,
        "data.instance_data_root": ROOT / "demo" / "zorp",
        "data.dataset_name": ROOT / "demo" / "zorp" / "metadata.csv",
        "precompute.cache": folder / "cache",
        "train.output_dir": folder / run,
        "train.lora_alpha": 16,
        "train.max_train_steps": STEPS,
        "train.global_batch_size": 6,
        "train.max_tokens_per_pack": 160,
        "train.validation_steps": 0,
        "train.preview_steps": STEPS,
        "data.validation_prompts": json.dumps(list(PREVIEWED)),
    }
    given = [f"{name}={value}" for name, value in places.items()]
    return load_config(ROOT / "configs" / "demo.toml", [*given, *overrides])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the demo's cache."""
    folder = tmp_path_factory.mktemp("miniature")
    precompute(config_in(folder, "run"))
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Config:
    """Return the config of a run of 60 steps."""
    config = config_in(folder, "run")
    train(config, StopSignal())
    return config


def test_a_linear_map_shows_clips_that_it_was_not_fitted_to(folder: Path) -> None:
    config = config_in(folder, "run")
    view, latents, _ = open_view(config.precompute.cache, config.data.name)
    samples = [latents.read(row.latent_key) for row in view.split("held_out")]
    means = [sample["moments"].float().chunk(2)[0].transpose(0, 1) for sample in samples]
    shown = np.concatenate([latent_pictures(mean, view.latent_rgb).ravel() for mean in means])
    true = np.concatenate([sample["thumbnails"].permute(0, 2, 3, 1).numpy().ravel() for sample in samples])
    assert np.corrcoef(shown, true)[0, 1] > 0.995  # 0.9989 measured


def held_out(run: Path) -> tuple[float, float]:
    """Return the held-out loss of the base and of the finished run."""
    lines = [line for line in read_metrics(run) if "held_out_loss" in line]
    return lines[0]["base_held_out_loss"], lines[-1]["held_out_loss"]


def unseen_zorps(pipeline: CogVideoXPipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scaled latents [B,F,C,H,W] and prompt embeddings [B,L,D] of new clips, through diffusers' parts."""
    rng = np.random.default_rng(99)
    grounds = [list(render.GROUNDS)[index % 3] for index in range(UNSEEN_ZORPS)]
    videos = np.stack([render.render(render.draw_concept(ground, 9, 64, 64, rng), 64, 64) for ground in grounds])
    pixels = torch.from_numpy(videos).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    latents = pipeline.vae.encode(pixels).latent_dist.mean.transpose(1, 2) * pipeline.vae.config.scaling_factor
    prompts = [render.CONCEPT_PATTERNS[0].format(ground=ground) for ground in grounds]
    embeds, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=16)
    return latents, embeds


@torch.no_grad()
def plain_loss(pipeline: CogVideoXPipeline) -> float:
    """Return the velocity loss of new clips of the concept by diffusers' own scheduler and forward."""
    latents, embeds = unseen_zorps(pipeline)
    losses = []
    for number in TIMESTEPS:
        timesteps = torch.full((len(latents),), number)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(number))
        noisy = pipeline.scheduler.add_noise(latents, noise, timesteps)
        target = pipeline.scheduler.get_velocity(latents, noise, timesteps)
        losses.append(float((pipeline.transformer(noisy, embeds, timesteps).sample - target).square().mean()))
    return sum(losses) / len(losses)


def test_sixty_steps_teach_the_miniature(trained: Config) -> None:
    base, after = held_out(trained.train.output_dir)
    pipeline = CogVideoXPipeline.from_pretrained(MINIATURE, dtype=torch.float32)
    plain_base = plain_loss(pipeline)
    pipeline.load_lora_weights(trained.train.output_dir / "export")
    plain_after = plain_loss(pipeline)
    report = f"held out {base:.4f} -> {after:.4f}, unseen zorps by diffusers {plain_base:.4f} -> {plain_after:.4f}"
    assert base == pytest.approx(BASE_LOSS, rel=0.005), report
    assert after < 0.74 * base, report
    assert plain_after < 0.60 * plain_base, report
    pipeline.unload_lora_weights()
    merged = export_run(trained.train.output_dir, "merged")[0].parent
    pipeline.transformer = CogVideoXTransformer3DModel.from_pretrained(merged)
    assert plain_loss(pipeline) == pytest.approx(plain_after, rel=1e-4)


def test_previews_show_what_the_prompts_say(trained: Config) -> None:
    for number, expected in enumerate(PREVIEWED.values()):
        preview = trained.train.output_dir / "previews" / f"step-{STEPS:06}" / f"{number:02}.webp"
        with Image.open(preview) as shown:
            frames = np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(shown)])
        found = render.read_scene(frames)
        assert (found.color, found.motion, found.ground) == expected


@pytest.mark.faults  # a run each
@pytest.mark.parametrize(
    "override",
    ["train.max_tokens_per_pack=1", "memory.activations=full", "memory.base_precision=int8", "two processes"],
)
def test_a_setting_that_only_saves_keeps_the_loss(folder: Path, override: str) -> None:
    runs: list[Path] = []
    for name, given in (("plain", "memory.activations=block_input"), (override.partition("=")[0], override)):
        config = config_in(folder, name, *([given] if "=" in given else []))
        if not (config.train.output_dir / "export").exists():
            if given == "two processes":
                assert processes.run(config, 2) == [0, 0]
            else:
                train(config, StopSignal())
        runs.append(config.train.output_dir)
    plain, changed = (held_out(run)[1] for run in runs)
    assert changed == pytest.approx(plain, rel=0.01)
    assert (changed != plain) or "int8" not in override, "an eight-bit base changes the loss, if only its fifth digit"


NEXT_ROW = "self.rows[(self.rows.index(row) + 1) % len(self.rows)]"
FAULTS = {
    "velocity's sign": ("train/objective.py", "] * noise - schedule.noise[", "] * noise + schedule.noise["),
    "no positions": ("train/transformer/forward.py", "if positions is None", "if positions is not None"),
    "timesteps shifted by 50": (
        "train/data/dataset.py",
        "ModelInput(noisy, embeds, step)",
        "ModelInput(noisy, embeds, (step + 50).clamp(max=999))",
    ),
    "text of another clip": (
        "train/data/dataset.py",
        "self._read(self._prompts, key, row)",
        f"self._read(self._prompts, {NEXT_ROW}.prompt_keys[0], row)",
    ),
    "wrong scaling factor": ("train/data/dataset.py", "* self._conventions.scaling", "/ self._conventions.scaling"),
    "alpha ignored": ("train/transformer/lora_linear.py", "float(layer.scaling[name])", "1.0"),
    "gradient not summed over packs": (
        "train/step.py",
        "    for pack in packs:\n",
        "    for pack in packs:\n        transformer.zero_grad()\n",
    ),
}
"""Fault -> file, a line's part, and what the fault puts in its place."""


@pytest.mark.faults  # a copy of the code and a run each
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_turns_the_guard_red(fault: str, tmp_path: Path) -> None:
    name, right, wrong = FAULTS[fault]
    for part in ("demo", "configs", "precompute", "sample", "shared", "train", "tests"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "pyproject.toml", tmp_path)
    source = (tmp_path / name).read_text("utf-8")
    assert right in source, f"{name}: {right!r} not found; write the fault again"
    (tmp_path / name).write_text(source.replace(right, wrong), "utf-8")
    guard = f"tests/test_miniature.py::{test_sixty_steps_teach_the_miniature.__name__}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=0", guard]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "AssertionError" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    (reason,) = re.findall(r"^E +(AssertionError.*)", done.stdout, flags=re.MULTILINE)[:1]
    sys.stdout.write(f"{fault}: {reason}\n")  # shown by pytest -s

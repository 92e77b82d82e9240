"""Previews: equal to diffusers' pipelines, written from the cache alone, decoded by the VAE alone, never in the way."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline
from PIL import Image, ImageSequence
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from precog import app
from sample.decode import decode
from sample.loras import find_loras, load_lora
from sample.pipeline import VideoStart, checkpoint_conventions, load_pipeline, make_video
from sample.prompts import embed_prompts
from shared.config import Config, Sampling
from shared.config_file import save_config
from shared.errors import CacheError, DataError, Preempted, UsageError
from shared.model.vae import decode_latents, load_decoder
from shared.run_folder import read_metrics
from shared.signals import StopSignal
from tests import experiments
from tests.media import write_clip
from tests.train import processes
from train.loop import train
from train.open_run import open_run
from train.preview import denoise, open_previews
from train.run import Run

NEGATIVE = "a white bird"
SAMPLE = Sampling(
    num_frames=9, height=experiments.HEIGHT, width=experiments.WIDTH, num_inference_steps=4, guidance_scale=5, seed=7
)


@pytest.fixture(scope="module", params=["2b", "5b", "1.5-5b", "5b-i2v", "1.5-5b-i2v"])
def experiment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Sincos with DDIM; RoPE with DPM; RoPE with DPM and padding frames; the same two from a first frame.

    One clip of the last one's is held out.
    """
    held_out = request.param == "1.5-5b-i2v"
    return cached(request.param, tmp_path_factory.mktemp(request.param), held_out_clips=int(held_out))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return cached("2b", tmp_path_factory.mktemp("small"), SAMPLE.model_copy(update={"height": 32, "width": 48}))


def cached(variant: str, folder: Path, sample: Sampling = SAMPLE, held_out_clips: int = 0) -> Config:
    config = experiments.write_experiment(variant, folder, max_train_steps=4, preview_steps=2, lora_rank=4)
    values = {"negative_prompt": NEGATIVE, "validation_prompts": experiments.CAPTIONS, "held_out_clips": held_out_clips}
    config = experiments.changed(config, data=values).model_copy(update={"sample": sample})
    experiments.fill_cache(config)
    return config


def changed(config: Config, folder: Path, **values: Any) -> Config:
    return experiments.changed(config, train={"output_dir": folder / "run", **values})


def opened(config: Config) -> Run:
    """Open a run whose adapter is not zero."""
    run = open_run(config)
    generator = torch.Generator().manual_seed(0)
    for _, parameter in run.parameters:
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return run


def preview(run: Run, number: int = 0) -> torch.Tensor:
    latents = denoise(run, open_previews(run)[number], lambda: False)
    assert latents is not None
    return latents


def decoder(config: Config) -> Any:
    return load_decoder(config.model, "auto", torch.device("cpu"))


def pipelines_own(run: Run, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents and frames of diffusers' pipeline with the run's transformer, from text and image."""
    settings, prompt = run.config.sample, experiments.CAPTIONS[number]
    kind = CogVideoXImageToVideoPipeline if run.conventions.image_to_video else CogVideoXPipeline
    pipeline = kind.from_pretrained(run.config.model.pretrained_model_name_or_path, transformer=run.transformer.eval())
    image = {"image": first_frame(run, number)} if run.conventions.image_to_video else {}
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        prompt=prompt,
        negative_prompt=NEGATIVE,
        num_frames=settings.num_frames,
        height=settings.height,
        width=settings.width,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        use_dynamic_cfg=settings.use_dynamic_cfg,
        max_sequence_length=run.conventions.text_length,
        generator=torch.Generator().manual_seed(settings.seed),
        output_type="latent",
        **image,
    ).frames
    padding = latents.shape[1] - (settings.num_frames - 1) // 4 - 1
    return latents[0, padding:], pipeline.decode_latents(latents[:, padding:])[0].detach()


def first_frame(run: Run, number: int) -> torch.Tensor:
    """[1,3,H,W] in [0, 1], decoded from the clip whose turn it is."""
    rows = run.held_out.rows or run.dataset.rows
    with av.open(str(run.config.data.instance_data_root / rows[number % len(rows)].source)) as container:
        frame = next(container.decode(video=0)).to_ndarray(format="rgb24")
    return torch.from_numpy(frame).permute(2, 0, 1)[None] / 255


def test_a_preview_equals_the_pipeline_of_diffusers(experiment: Config, tmp_path: Path) -> None:
    number = 1
    run = opened(changed(experiment, tmp_path))
    latents = preview(run, number)
    expected, frames = pipelines_own(run, number)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    shown = decode_latents(decoder(run.config), latents)
    asked = ((frames / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 3, 0)
    assert float((torch.from_numpy(shown) - asked).abs().max()) < 1
    run.transformer.disable_adapters()
    assert not torch.allclose(preview(run, number), expected, atol=1e-2)


@pytest.mark.parametrize("fields", [{"use_dynamic_cfg": True}, {"guidance_scale": 1.0}, {"num_frames": 1}])
def test_guidance_and_length_follow_the_pipeline(fields: dict[str, Any], small: Config, tmp_path: Path) -> None:
    run = opened(experiments.changed(changed(small, tmp_path), sample=fields))
    latents = preview(run, 1)
    torch.testing.assert_close(latents, pipelines_own(run, 1)[0], rtol=1e-4, atol=1e-4)
    plain = preview(opened(changed(small, tmp_path)), 1)
    assert latents.shape != plain.shape or not torch.allclose(latents, plain, atol=1e-2)


def test_previews_do_not_change_the_training(small: Config, tmp_path: Path) -> None:
    config, plain = changed(small, tmp_path), changed(small, tmp_path / "plain", preview_steps=0)
    train(config, StopSignal())
    train(plain, StopSignal())
    assert [line["loss"] for line in read_metrics(config.train.output_dir)] == [
        line["loss"] for line in read_metrics(plain.train.output_dir)
    ]
    assert not (plain.train.output_dir / "previews").exists()
    folder = config.train.output_dir / "previews"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002", "step-000004"]
    first, last = (load_file(folder / name / "01.safetensors")["latents"] for name in ("step-000002", "step-000004"))
    assert first.shape == (3, 16, 4, 6) and not torch.equal(first, last)
    about = json.loads((folder / "step-000004" / "01.json").read_text(encoding="utf-8"))
    assert about["prompt"] == experiments.CAPTIONS[1] and about["step"] == 4 and about["seed"] == 7
    assert about["first_frame_of"] is None and (about["num_frames"], about["height"], about["width"]) == (9, 32, 48)

    with Image.open(folder / "step-000004" / "01.webp") as shown:  # at once, without the VAE
        assert (shown.size, len(list(ImageSequence.Iterator(shown)))) == ((48, 32), 3)

    save_config(config, tmp_path / "config.toml")
    done = CliRunner().invoke(app, ["decode", str(tmp_path / "config.toml"), "--json"])
    written = [Path(path) for path in json.loads(done.stdout)]
    names = ("00.mp4", "01.mp4", "sheet.png")
    assert written == [folder / step / name for step in ("step-000002", "step-000004") for name in names]
    with Image.open(folder / "step-000004" / "sheet.png") as sheet:
        assert sheet.width > 3 * 48 and sheet.height > 2 * 32
    assert decode(config) == []
    # The last preview is the video of `precog sample` with the exported adapter.
    conventions, device = checkpoint_conventions(config), torch.device("cpu")
    pipeline, texts = load_pipeline(config, conventions, device), (experiments.CAPTIONS[1], NEGATIVE)
    load_lora(pipeline, find_loras(config)[0])
    embeds = embed_prompts(config, texts, conventions, device)
    video = make_video(config, pipeline, conventions, (embeds[texts[0]], embeds[NEGATIVE]), 7, VideoStart())
    assert abs(decode_latents(decoder(config), last).astype(int) - video).max() <= 1


def test_image_to_video_previews_have_the_size_of_clips(tmp_path: Path) -> None:
    """Two clips of two sizes, and three prompts: the third begins with the first clip's frame again."""
    folder = tmp_path / "experiment"
    config = experiments.write_experiment("1.5-5b-i2v", folder, max_train_steps=1, preview_steps=1, lora_rank=4)
    write_clip(folder / "clips" / "1.mp4", frames=9, height=48, width=64)
    values = {"resolution_buckets": ((64, 96), (48, 64)), "validation_prompts": ("one", "two", "three")}
    sample = SAMPLE.model_copy(update={"num_frames": 33})
    config = experiments.changed(config, data=values).model_copy(update={"sample": sample})
    experiments.fill_cache(config)
    train(config, StopSignal())
    step = config.train.output_dir / "previews" / "step-000001"
    about = [json.loads((step / f"{number:02}.json").read_text(encoding="utf-8")) for number in range(3)]
    shown = [(one["first_frame_of"], one["num_frames"], one["height"], one["width"]) for one in about]
    assert set(shown) == {("0.mp4 at 0.00 s", 9, 64, 96), ("1.mp4 at 0.00 s", 9, 48, 64)}
    assert shown[0] != shown[1] and shown[2] == shown[0]
    shapes = [load_file(step / f"{number:02}.safetensors")["latents"].shape for number in range(3)]
    assert shapes == [(3, 16, height // 8, width // 8) for _, _, height, width in shown]
    assert [path.name for path in decode(config)] == ["00.mp4", "01.mp4", "02.mp4", "sheet.png"]


def test_two_processes_share_the_previews_and_write_those_of_one(small: Config, tmp_path: Path) -> None:
    config = changed(small, tmp_path, max_train_steps=2)
    folder = config.train.output_dir

    def made(seed: int, world_size: int) -> list[bytes]:
        """Return the previews of step 2; the last rank has its own settings."""
        shutil.rmtree(folder / "previews", ignore_errors=True)
        shutil.rmtree(folder / "export", ignore_errors=True)
        other = experiments.changed(config, sample={"seed": seed})
        children = processes.start(config, world_size, configs={world_size - 1: other})
        assert processes.finish(children) == [0] * world_size, processes.log(config)
        return [(folder / "previews" / "step-000002" / f"0{number}.safetensors").read_bytes() for number in range(2)]

    shared = made(7, 2)  # trains, and the next ones resume its checkpoint
    assert made(7, 1) == shared
    first, second = made(8, 2)
    assert first == shared[0] and second != shared[1], "rank 1 denoises the second prompt"


def test_a_preview_cut_off_by_a_signal_is_made_on_resume(small: Config, tmp_path: Path) -> None:
    straight, cut = changed(small, tmp_path / "straight"), changed(small, tmp_path / "cut")
    train(straight, StopSignal())
    with pytest.raises(Preempted, match="checkpoint saved at step 2 of"):
        train(cut, processes.StopAt(cut.train.output_dir, 2))
    train(cut, StopSignal())

    def made(config: Config) -> dict[str, bytes]:
        folder = config.train.output_dir
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("previews/*/*.safetensors")}

    assert made(cut) == made(straight) != {}


def test_an_impossible_preview_is_refused_at_the_start(small: Config, tmp_path: Path) -> None:
    config = changed(small, tmp_path)
    run = open_run(config)

    def refusal(data: dict[str, Any], sample: dict[str, Any]) -> None:
        open_previews(replace(run, config=experiments.changed(config, data=data, sample=sample)))

    with pytest.raises(UsageError, match=r"preview_steps = 2: data\.validation_prompts is empty"):
        refusal({"validation_prompts": ()}, {})
    with pytest.raises(UsageError, match=r"preview_steps = 2: sample.num_frames, height and width: 8x.*4k\+1"):
        refusal({}, {"num_frames": 8})
    with pytest.raises(CacheError, match="prompt 'unheard of' not found; run `precog precompute`"):
        refusal({"validation_prompts": ("unheard of",)}, {})
    missing = experiments.changed(config, data={"validation_prompts": ("unheard of",)})
    with pytest.raises(CacheError):
        train(missing, StopSignal())
    assert not read_metrics(config.train.output_dir)


def test_decode_names_what_it_cannot_read(small: Config, tmp_path: Path) -> None:
    config = changed(small, tmp_path)
    with pytest.raises(UsageError, match=r"no previews found; set train\.preview_steps"):
        decode(config)
    step = config.train.output_dir / "previews" / "step-000002"
    step.mkdir(parents=True)
    path = step / "00.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(DataError, match=re.escape(f"{path}: not a preview's latents")):
        decode(config)
    save_file({"latents": torch.zeros(3, 4, 8, 12)}, path)
    with pytest.raises(DataError, match=re.escape("shape (3, 4, 8, 12)")):
        decode(config)

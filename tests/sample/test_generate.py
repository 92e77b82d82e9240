"""Videos of `precog sample` against diffusers' own pipelines, in every memory mode; what is made is not made again."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXVideoToVideoPipeline,
)
from PIL import Image
from safetensors.torch import load_file

from sample.generate import read_starts, sample
from sample.loras import find_loras, load_lora, set_loras
from sample.pipeline import VideoStart, checkpoint_conventions, load_pipeline, make_video, put_on_device
from sample.prompts import embed_prompts
from shared.config import Config, Data, Model, Precompute, SampleLora, Sampling, Train
from shared.errors import UsageError
from shared.video import write_mp4
from tests.tiny import VARIANTS, build_transformer, save_pipeline
from train.export import export_adapter

CPU = torch.device("cpu")
PROMPT, NEGATIVE = "a grey rabbit yawns", "a white bird"


def experiment(variant: str, folder: Path, **fields: Any) -> Config:
    """Return the config of a tiny checkpoint in `folder`, whose run has exported a LoRA with alpha twice its rank."""
    train = Train(output_dir=folder / "run", lora_rank=4, lora_alpha=8)
    if not (folder / "model").exists():
        save_pipeline(variant, folder / "model")
        export_adapter(build_transformer(variant, lora_rank=4), train, folder / "run" / "export", {})
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 255, (9, 4, 6, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)
        Image.fromarray(pixels[0]).save(folder / "first.png")
        write_mp4(folder / "input.mp4", pixels, 8)
    height, width = (64, 96) if variant == "5b-i2v" else (32, 48)  # its learned positions have one size
    values: dict[str, Any] = {
        "num_frames": 9,
        "height": height,
        "width": width,
        "num_inference_steps": 2,
        "guidance_scale": 5.0,
        "seed": 7,
    }
    values |= {"prompts": (PROMPT,), "images": (folder / "first.png",) if variant.endswith("i2v") else ()} | fields
    return Config(
        model=Model(pretrained_model_name_or_path=str(folder / "model")),
        data=Data(name="none", instance_data_root=folder, negative_prompt=NEGATIVE),
        precompute=Precompute(cache=str(folder / "cache")),
        train=train,
        sample=Sampling(output_dir=folder / "samples", **values),
    )


@pytest.fixture(scope="module")
def plain_frames(folder: Path) -> np.ndarray:
    """Return the frames of the unchanged settings, which many tests compare with."""
    return frames(experiment("2b", folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder whose files only `experiment("2b", ...)` uses."""
    return tmp_path_factory.mktemp("2b")


def frames(config: Config, *, with_lora: bool = True) -> np.ndarray:
    """Return the frames of `precog sample` before they are compressed."""
    conventions = checkpoint_conventions(config)
    pipeline, loras = load_pipeline(config, conventions, CPU), find_loras(config)
    load_lora(pipeline, loras[0])
    put_on_device(pipeline, config, conventions, CPU)
    set_loras(pipeline, loras if with_lora else ())
    embeds = embed_prompts(config, (PROMPT, NEGATIVE), conventions, CPU)
    ((start, _),) = read_starts(config, conventions, 1)
    return make_video(config, pipeline, conventions, (embeds[PROMPT], embeds[NEGATIVE]), config.sample.seed, start)


def plain(config: Config, kind: Any, lora_strength: float = 1.0, **inputs: Any) -> np.ndarray:
    """Return the frames, 0 to 255, of docs/from-diffusers.md's code."""
    pipe = kind.from_pretrained(config.model.pretrained_model_name_or_path)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(config.train.output_dir / "export"), adapter_name="mine")
    pipe.set_adapters(["mine"], [lora_strength])
    settings = config.sample
    found = pipe(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=settings.height,
        width=settings.width,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        use_dynamic_cfg=settings.use_dynamic_cfg,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(settings.seed),
        output_type="np",
        **inputs,
    ).frames[0]
    return np.asarray(found) * 255


def assert_same(ours: np.ndarray, expected: np.ndarray) -> None:
    """Assert that uint8 frames are those from 0 to 255, to 1e-4 of their range before rounding."""
    assert ours.shape == expected.shape and expected.std() > 5
    assert np.abs(ours - expected).max() <= 0.5 + 255e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_video_is_that_of_plain_diffusers_with_the_export(variant: str, tmp_path: Path) -> None:
    config = experiment(variant, tmp_path, guidance_scale=6, use_dynamic_cfg=True)
    kind: Any = CogVideoXPipeline
    inputs: dict[str, Any] = {"num_frames": 9}
    if variant.endswith("i2v"):
        kind, inputs = (
            CogVideoXImageToVideoPipeline,
            inputs | {"image": Image.open(tmp_path / "first.png").convert("RGB")},
        )
    assert_same(frames(config), plain(config, kind, **inputs))


@pytest.mark.parametrize("variant", ["2b", "1.5-5b"])
def test_a_video_from_a_video_is_that_of_plain_diffusers(variant: str, tmp_path: Path) -> None:
    config = experiment(variant, tmp_path, video=tmp_path / "input.mp4", strength=0.7, num_inference_steps=3)
    conventions = checkpoint_conventions(config)
    video = read_starts(config, conventions, 1)[0][0].video
    assert len(video) == (8 if variant.startswith("1.5") else 9)
    assert_same(frames(config), plain(config, CogVideoXVideoToVideoPipeline, video=video, strength=0.7))


def test_the_strength_scales_alpha_over_rank_once(folder: Path) -> None:
    config = experiment("2b", folder, loras=(SampleLora(path=folder / "run", strength=1.25),))
    made, conventions = frames(config), checkpoint_conventions(config)
    assert_same(made, plain(config, CogVideoXPipeline, 1.25, num_frames=9))
    pipe = load_pipeline(config, conventions, CPU)
    weights = load_file(folder / "run" / "export" / "pytorch_lora_weights.safetensors")
    for name, down in weights.items():
        if "lora_A" in name:
            layer = pipe.transformer.get_submodule(name.removeprefix("transformer.").partition(".lora_")[0])
            layer.weight.data += 1.25 * (8 / 4) * weights[name.replace("lora_A", "lora_B")] @ down
    embeds = embed_prompts(config, (PROMPT, NEGATIVE), conventions, CPU)
    merged = make_video(config, pipe, conventions, (embeds[PROMPT], embeds[NEGATIVE]), 7, VideoStart())
    assert np.abs(made.astype(int) - merged).max() <= 1
    nothing = experiment("2b", folder, loras=(SampleLora(path=folder / "run", strength=0),))
    base = frames(nothing, with_lora=False)
    np.testing.assert_array_equal(frames(nothing), base)
    assert np.abs(made.astype(int) - base).mean() > 1


@pytest.mark.parametrize("mode", ["model_offload", "group_offload", "sequential_offload"])
def test_a_memory_mode_changes_no_pixel(mode: str, folder: Path, plain_frames: np.ndarray) -> None:
    made = frames(experiment("2b", folder, memory=mode))
    assert np.abs(made.astype(int) - plain_frames).max() <= 1


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({"base_precision": "int8"}, 8),
        ({"base_precision": "fp8"}, 40),
        ({"dtype": "bf16"}, 40),
        ({"scheduler": "dpm"}, 255),
        ({"guidance_scale": 1}, 255),
    ],
)
def test_a_setting_of_precision_or_schedule_acts(
    fields: dict[str, Any], most: float, folder: Path, plain_frames: np.ndarray
) -> None:
    made = frames(experiment("2b", folder, **fields))
    difference = float(np.abs(made.astype(int) - plain_frames).mean())
    assert 0.01 < difference < most, difference


def test_tiles_change_the_decoding(folder: Path) -> None:
    sizes = {"num_frames": 5, "height": 64, "width": 48, "num_inference_steps": 1}  # two tiles, one below the other
    tiled, whole = (frames(experiment("2b", folder, enable_tiling=tiles, **sizes)) for tiles in (True, False))
    assert np.abs(tiled.astype(int) - whole).mean() > 0.01


@pytest.mark.parametrize(("name", "kind"), [("ddim", "CogVideoXDDIMScheduler"), ("dpm", "CogVideoXDPMScheduler")])
def test_the_scheduler_is_the_one_asked_for(name: str, kind: str, folder: Path) -> None:
    config = experiment("2b", folder, scheduler=name)
    scheduler: Any = load_pipeline(config, checkpoint_conventions(config), CPU).scheduler
    assert type(scheduler).__name__ == kind and scheduler.config["snr_shift_scale"] == 3.0


def test_only_what_is_missing_or_changed_is_made(tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("\na white bird glides\n\n", "utf-8")
    fields = {
        "prompts": (),
        "prompts_file": tmp_path / "more.txt",
        "num_videos_per_prompt": 2,
        "num_inference_steps": 1,
        "num_frames": 5,
    }
    config = experiment("2b", tmp_path, **fields)
    assert sample(config)["made"] == 4
    videos = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "samples").glob("*.mp4"))}
    names = [f"00-a-white-bird-glides-seed{seed}-{kind}.mp4" for seed in (7, 8) for kind in ("base", "lora")]
    assert [path.name for path in videos] == names
    again = sample(config)
    assert again["made"] == 0 and {path: path.stat().st_mtime_ns for path in videos} == videos
    (tmp_path / "samples" / names[3]).with_suffix(".json").unlink()
    assert sample(config)["made"] == 1
    assert sample(experiment("2b", tmp_path, **fields | {"guidance_scale": 3.0}))["made"] == 4, "the same names"
    sample(config)
    half = experiment("2b", tmp_path, **fields, loras=(SampleLora(path=tmp_path / "run", strength=0.5),))
    assert sample(half)["made"] == 2, "the base model's videos are the same"
    with Image.open(tmp_path / "samples" / "sheet.png") as sheet:
        assert sheet.height == 4 * (14 + 32 + 4)


def test_a_grid_compares_each_lora_with_the_base(tmp_path: Path) -> None:
    strengths = (0.0, 0.5, 1.0)
    loras = tuple(SampleLora(path=tmp_path / "run", strength=strength) for strength in strengths)
    made = sample(experiment("2b", tmp_path, loras=loras, num_frames=5), grid=True)
    records: Any = made["videos"]
    assert [record["label"] for record in records] == ["base", "run x0", "run x0.5", "run x1"]
    distances = [record["distance"] for record in records]
    assert distances[0] == 0 and distances[1] < 0.01 < distances[2] < distances[3]
    pipe: Any = CogVideoXPipeline.from_pretrained(tmp_path / "model")
    (tmp_path / "line.py").write_text(records[2]["load"]["diffusers"], "utf-8")
    runpy.run_path(str(tmp_path / "line.py"), {"pipe": pipe})
    assert pipe.get_active_adapters() == ["lora0"]
    assert pipe.transformer.transformer_blocks[0].attn1.to_q.scaling == {"lora0": 0.5 * 8 / 4}
    assert "precog export" in records[2]["load"]["comfyui"] and "strength_model = 0.5" in records[2]["load"]["comfyui"]
    with pytest.raises(UsageError, match=r"a file is named twice; give one strength, or compare them with --grid"):
        sample(experiment("2b", tmp_path, loras=loras))


def test_an_input_that_does_not_fit_the_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"sample\.images: expected 0, as the checkpoint is text-to-video, got 1"):
        sample(experiment("2b", folder, images=(folder / "first.png",)))
    with pytest.raises(UsageError, match=r"sample\.images: expected 1, one per prompt, got 0"):
        sample(experiment("5b-i2v", tmp_path, images=()))
    with pytest.raises(UsageError, match=r"sample\.video: must be empty for an image-to-video checkpoint"):
        sample(experiment("5b-i2v", tmp_path, video=folder / "input.mp4"))
    with pytest.raises(UsageError, match=r"input\.mp4 has 9 frames at 8 fps, expected 17; lower sample\.num_frames"):
        sample(experiment("2b", folder, video=folder / "input.mp4", num_frames=17))
    with pytest.raises(UsageError, match=r"first\.txt: not a video: .*; replace the file"):
        (folder / "first.txt").write_text("no video", "utf-8")
        sample(experiment("2b", folder, video=folder / "first.txt"))
    with pytest.raises(UsageError, match=r"sample\.num_frames, height and width: 10x32x48: frames must be 4k\+1"):
        sample(experiment("2b", folder, num_frames=10))


@pytest.mark.faults  # dynamo takes long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when dynamo is imported
def test_a_compiled_transformer_makes_the_same_video(
    folder: Path, plain_frames: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and compiled without C++ code, which takes minutes to build."""
    compiled: list[str] = []

    def compile_quickly(module: torch.nn.Module) -> None:
        compiled.append(type(module).__name__)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    made = frames(experiment("2b", folder, compile=True))
    assert compiled == ["CogVideoXBlock", "CogVideoXBlock"]
    assert np.abs(made.astype(int) - plain_frames).max() <= 1

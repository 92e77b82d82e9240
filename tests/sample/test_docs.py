"""The code of docs/from-diffusers.md makes the frames of `precog sample`, with the miniature."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from sample.loras import find_loras, load_lora, set_loras
from sample.pipeline import VideoStart, checkpoint_conventions, load_pipeline, make_video
from sample.prompts import embed_prompts
from shared.config_file import load_config
from tests.tiny import add_lora
from train.export import export_adapter

ROOT = Path(__file__).parents[2]


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to a folder with the demo, whose run has exported a LoRA of random weights."""
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)
    transformer = CogVideoXTransformer3DModel.from_pretrained("demo/mini/transformer", torch_dtype=torch.float32)
    train = load_config(ROOT / "configs" / "demo.toml", ["train.lora_rank=8"]).train
    add_lora(transformer.requires_grad_(False), 8, target_modules=train.lora_target_modules, lora_alpha=32)
    for name, value in transformer.named_parameters():
        if "lora_" in name:
            value.data *= 0.2
    export_adapter(transformer, train, Path("runs/demo/export"), {})
    return tmp_path


def test_the_code_for_diffusers_makes_our_frames(demo: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "from-diffusers.md").read_text("utf-8"), re.DOTALL)
    few = block.replace("num_inference_steps=20", "num_inference_steps=4")
    assert few != block
    (demo / "example.py").write_text(few, "utf-8")
    expected = np.asarray(runpy.run_path(str(demo / "example.py"))["frames"]) * 255
    config = load_config(ROOT / "configs" / "demo.toml", ["precompute.text_dtype=fp32", "sample.num_inference_steps=4"])
    conventions, cpu = checkpoint_conventions(config), torch.device("cpu")
    pipeline, prompt = load_pipeline(config, conventions, cpu), config.sample.prompts[0]
    (lora,) = find_loras(config)
    load_lora(pipeline, lora)
    embeds = embed_prompts(config, [prompt, ""], conventions, cpu)
    pair = embeds[prompt], embeds[""]
    made = make_video(config, pipeline, conventions, pair, config.sample.seed, VideoStart())
    assert np.abs(made - expected).max() <= 0.5 + 255e-4
    set_loras(pipeline, ())
    base = make_video(config, pipeline, conventions, pair, config.sample.seed, VideoStart())
    assert np.abs(base - expected).mean() > 1

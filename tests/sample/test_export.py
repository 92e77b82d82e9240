"""An exported adapter is the trained one in every format, and damage or another model's file is named."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from precog import app
from sample.export import export_run, read_run_adapter, write_lora
from shared.config import Config, Train
from shared.config_file import save_config
from shared.errors import Preempted, UsageError
from shared.model.adapters import LoraFile, pack_lora, read_lora
from shared.signals import StopSignal
from tests import tiny
from tests.train import processes
from train.checkpoint.files import save_checkpoint
from train.export import adapter_header, read_adapter
from train.loop import train
from train.transformer.load import adapter_weights, add_adapter, load_adapter_weights

Settings = Callable[..., Config]

COMFYUI = {
    "transformer_blocks.1.attn1.to_q": ("blocks.1.q", 64, 64),
    "transformer_blocks.1.attn1.to_k": ("blocks.1.k", 64, 64),
    "transformer_blocks.1.attn1.to_v": ("blocks.1.v", 64, 64),
    "transformer_blocks.1.attn1.to_out.0": ("blocks.1.attn_out", 64, 64),
    "transformer_blocks.1.ff.net.0.proj": ("blocks.1.ff_proj", 256, 64),
    "transformer_blocks.1.ff.net.2": ("blocks.1.ff_out", 64, 256),
    "transformer_blocks.1.norm1.linear": ("blocks.1.norm1.linear", 384, 48),
    "transformer_blocks.1.norm2.linear": ("blocks.1.norm2.linear", 384, 48),
    "time_embedding.linear_1": ("time_embedding_linear_1", 48, 64),
    "ofs_embedding.linear_2": ("ofs_embedding_linear_2", 48, 48),
    "norm_out.linear": ("norm_out.linear", 128, 48),
    "patch_embed.text_proj": ("patch_embed.text_proj", 64, 32),
    "proj_out": ("proj_out", 128, 64),
}
"""diffusers' layer -> (ComfyUI's name, out, in) for the sizes of the tiny 1.5-5b-i2v.

Names and sizes are those of `CogVideoXTransformer3DModel` in ComfyUI's `comfy/ldm/cogvideo/model.py` (April 2026). The
key of a layer in a LoRA is `diffusion_model.` and its name (`comfy/lora.py`), its change alpha / rank * B @ A
(`comfy/weight_adapter/lora.py`).
"""


def output(transformer: Any, variant: str = "2b") -> torch.Tensor:
    """Return the transformer's answer to fixed noise."""
    generator = torch.Generator().manual_seed(1)
    channels = transformer.config.in_channels
    with torch.no_grad():
        found: torch.Tensor = transformer(
            hidden_states=torch.randn(1, 3, channels, 8, 12, generator=generator),
            encoder_hidden_states=torch.randn(1, tiny.TEXT_LENGTH, tiny.TEXT_WIDTH, generator=generator),
            timestep=torch.tensor([500]),
            return_dict=False,
        )[0]
    return found


def write_run(config: Config, steps: tuple[int, ...], **options: Any) -> tuple[Path, Any]:
    """Write a run folder with a checkpoint of drawn weights per step; return it and the last step's transformer."""
    settings = Train(output_dir=config.train.output_dir, lora_rank=4, lora_alpha=10, **options)
    save_config(config.model_copy(update={"train": settings}), settings.output_dir / "config.toml")
    for step in steps:
        transformer = CogVideoXTransformer3DModel.from_pretrained(
            config.model.pretrained_model_name_or_path, subfolder="transformer"
        )
        add_adapter(transformer.requires_grad_(False), settings)
        for name, value in adapter_weights(transformer).items():
            torch.nn.init.normal_(value, std=0.1, generator=torch.Generator().manual_seed(step + len(name)))
        header = adapter_header(settings) | {"precog_steps": str(step), "precog_trigger": "sks"}
        save_checkpoint(settings.output_dir, step, {"adapter": adapter_weights(transformer)}, {}, header)
    return settings.output_dir, transformer.eval()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_every_format_acts_as_the_trained_adapter(options: dict[str, Any], settings: Settings, tmp_path: Path) -> None:
    config = settings()
    config.train.output_dir.mkdir(parents=True)
    run, trained = write_run(config, (1, 2), **options)
    model = config.model.pretrained_model_name_or_path
    base = CogVideoXTransformer3DModel.from_pretrained(model, subfolder="transformer")
    assert (output(base) - output(trained)).abs().max() > 1e-2

    [file] = export_run(run, "diffusers")
    pipeline = CogVideoXPipeline.from_pretrained(model)
    pipeline.load_lora_weights(str(file))
    torch.testing.assert_close(output(pipeline.transformer.eval()), output(trained), rtol=1e-6, atol=1e-6)

    merged = export_run(run, "merged")[0].parent
    found = CogVideoXTransformer3DModel.from_pretrained(merged)
    torch.testing.assert_close(output(found), output(trained), rtol=1e-5, atol=1e-5)
    half = load_file(export_run(run, "merged", precision="bf16")[-1])
    assert {value.dtype for value in half.values()} == {torch.bfloat16}

    files = [file, export_run(run, "peft")[0]]
    if options:
        with pytest.raises(UsageError, match="use_dora") if "use_dora" in options else pytest.raises(AssertionError):
            export_run(run, "comfyui")
            raise AssertionError
    else:
        files += [export_run(run, "comfyui")[0], *foreign(file, tmp_path)]
        assert len(files) == 5
    for each in files:
        fresh = CogVideoXTransformer3DModel.from_pretrained(model, subfolder="transformer")
        train_settings = Train(output_dir=run, lora_rank=4, lora_alpha=10, **options)
        add_adapter(fresh.requires_grad_(False), train_settings)
        load_adapter_weights(fresh, read_adapter(fresh, train_settings, each))
        torch.testing.assert_close(output(fresh.eval()), output(trained), rtol=1e-6, atol=1e-6)


def foreign(file: Path, folder: Path) -> list[Path]:
    """Write an export as kohya's scripts do, and under diffusers' names with ComfyUI's prefix."""
    stored = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    modules = {name.partition(".lora_")[0] for name in stored}
    kohya = {f"lora_unet_{module.replace('.', '_')}.alpha": torch.tensor(10.0) for module in modules}
    for name, value in stored.items():
        module, side = name.partition(".lora_")[::2]
        kohya[f"lora_unet_{module.replace('.', '_')}.lora_{'down' if side[0] == 'A' else 'up'}.weight"] = value
    mixed = {f"diffusion_model.{name}": value for name, value in stored.items()}
    mixed |= {f"diffusion_model.{module}.alpha": torch.tensor(10.0) for module in modules}
    paths = [folder / "kohya.safetensors", folder / "mixed.safetensors"]
    for path, tensors in zip(paths, (kohya, mixed), strict=True):
        save_file(tensors, path)
    return paths


@pytest.mark.parametrize("use_rslora", [False, True])
def test_comfyui_finds_every_layer_with_its_change(use_rslora: bool, tmp_path: Path) -> None:
    transformer = tiny.build_transformer("1.5-5b-i2v")
    targets = tuple(COMFYUI)
    settings = Train(
        output_dir=tmp_path, lora_rank=4, lora_alpha=10, lora_target_modules=targets, use_rslora=use_rslora
    )
    add_adapter(transformer, settings)
    for value in adapter_weights(transformer).values():
        torch.nn.init.normal_(value, std=0.1)
    save_checkpoint(tmp_path, 7, {"adapter": adapter_weights(transformer)}, {}, adapter_header(settings))
    [file] = export_run(tmp_path, "comfyui")
    stored, layers = load_file(file), dict(transformer.named_modules())
    parts = ("lora_A.weight", "lora_B.weight", "alpha")
    assert stored.keys() == {f"diffusion_model.{name}.{part}" for name, *_ in COMFYUI.values() for part in parts}
    for ours, (theirs, out, into) in COMFYUI.items():
        down, up, alpha = (stored[f"diffusion_model.{theirs}.{part}"] for part in parts)
        assert (up.shape, down.shape) == ((out, 4), (4, into)), ours
        base = layers[ours].base_layer.weight
        assert base.shape == (out, into)
        expected = base + layers[ours].get_delta_weight("default")
        torch.testing.assert_close(base + alpha.item() / down.shape[0] * (up @ down), expected, rtol=1e-6, atol=1e-6)


def test_a_stopped_run_exports_and_steps_average(settings: Settings) -> None:
    config = settings(max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=3)
    with pytest.raises(Preempted):
        train(config, processes.StopAt(config.train.output_dir, 3))
    run = config.train.output_dir
    assert not (run / "export" / "pytorch_lora_weights.safetensors").exists()
    done = CliRunner().invoke(app, ["export", str(run), "--format", "comfyui", "--precision", "bf16", "--json"])
    assert done.exit_code == 0, done.stderr
    [file] = json.loads(done.stdout)["files"]
    found = read_lora(Path(file), read_run_adapter(run).modules, "test")
    assert all(
        torch.equal(value, read_run_adapter(run).weights[name].bfloat16().float())
        for name, value in found.weights.items()
    )
    assert found.header["precog_base_model"] == Path(config.model.pretrained_model_name_or_path).name
    steps = [int(path.name[-6:]) for path in sorted(run.glob("checkpoint-*"))]
    mean = read_run_adapter(run, steps)
    each = [read_run_adapter(run, [step]) for step in steps]
    for name, value in mean.weights.items():
        expected = sum(one.weights[name] for one in each) / len(each)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)
    assert mean.header["precog_steps"] == ",".join(map(str, steps))
    train(config, StopSignal())
    assert (run / "export" / "pytorch_lora_weights.safetensors").exists(), "an export does not end the run"


def test_a_wrong_choice_is_one_line(settings: Settings) -> None:
    config = settings()
    config.train.output_dir.mkdir(parents=True)
    run, _ = write_run(config, (1, 2))
    for arguments, code, line in (
        (["--step", "9"], 2, "--step 9: .* has no adapter of this step; there are 1, 2"),
        (["--step", "x"], 2, "--step 'x': expected optimizer steps"),
        (["--best"], 2, "cannot be read as a LoRA"),
        (["--step", "1", "--best"], 2, "not together with --best"),
        (["--step", "2", "--precision", "fp16"], 0, ""),
    ):
        done = CliRunner().invoke(app, ["export", str(run), *arguments])
        assert (done.exit_code, bool(done.stderr)) == (code, True)
        assert re.search(line, " ".join(done.stderr.split())), done.stderr


def test_a_weight_beyond_fp16_is_refused(tmp_path: Path) -> None:
    weights = {"a.lora_A.weight": torch.full((1, 2), 1e5), "a.lora_B.weight": torch.ones(2, 1)}
    lora = LoraFile(weights, rank=1, alpha=1, use_rslora=False, use_dora=False, header={})
    with pytest.raises(UsageError, match=r"a\.lora_A\.weight is not finite in torch\.float16; use bf16 or fp32"):
        write_lora(lora, "diffusers", tmp_path, "a", "fp16")


def test_a_changed_checkpoint_and_a_changed_base_are_refused(settings: Settings, tmp_path: Path) -> None:
    config = settings()
    config.train.output_dir.mkdir(parents=True)
    run, _ = write_run(config, (1,))
    file = run / "checkpoint-000001" / "adapter.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert CliRunner().invoke(app, ["export", str(run)]).exit_code == 3
    found = load_file(shutil.copy(file, tmp_path / "copy.safetensors"))
    header = adapter_header(Train(output_dir=run, lora_rank=4, lora_alpha=10)) | {"precog_base": "another"}
    file.write_bytes(pack_lora(found, header))
    with pytest.raises(UsageError, match="trained on other weights than"):
        export_run(run, "merged")

"""Every trainer's LoRA file reads as the same tensors and alpha, and a changed bit of an export is found."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shared.errors import DataError, UsageError
from shared.model.adapters import METADATA_KEY, diffusers_settings, pack_lora, read_lora

MODULES = [f"transformer_blocks.{block}.attn1.{layer}" for block in (0, 1) for layer in ("to_q", "to_out.0")]
WEIGHTS = {
    f"{name}.lora_{side}.weight": torch.randn(shape)
    for name in MODULES
    for side, shape in (("A", (4, 6)), ("B", (6, 4)))
}
KOHYA = {"lora_A": "lora_down", "lora_B": "lora_up"}


def write(form: str, path: Path) -> Path:
    """Write the weights with alpha 10 as the trainers of one format do."""
    header = {"format": "pt"}
    tensors = {f"base_model.model.{name}": value for name, value in WEIGHTS.items()}
    if form == "peft":
        path.with_name("adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 10}))
    elif form == "diffusers":
        tensors = {f"transformer.{name}": value for name, value in WEIGHTS.items()}
        header[METADATA_KEY] = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 10})
    elif form == "comfyui":
        tensors = {f"diffusion_model.{name}": value for name, value in WEIGHTS.items()}
        tensors |= {f"diffusion_model.{name}.alpha": torch.tensor(10.0) for name in MODULES}
    else:
        prefix, mark = ("lora_unet_", "_") if form == "kohya" else ("transformer.", ".")
        names = {name: f"{prefix}{name.replace('.', mark)}" for name in MODULES}
        tensors = {f"{names[name]}.alpha": torch.tensor(10.0) for name in MODULES}
        for name, value in WEIGHTS.items():
            module, side, _ = name.rsplit(".", 2)
            tensors[f"{names[module]}.{KOHYA[side]}.weight"] = value
    save_file(tensors, path, header)
    return path


@pytest.mark.parametrize("form", ["diffusers", "peft", "comfyui", "kohya", "kohya with dots"])
def test_every_format_reads_as_the_same_lora(form: str, tmp_path: Path) -> None:
    found = read_lora(write(form, tmp_path / "lora.safetensors"), MODULES, "sample.lora")
    assert (found.rank, found.alpha, found.modules) == (4, 10.0, sorted(MODULES))
    assert found.weights.keys() == WEIGHTS.keys()
    assert all(torch.equal(found.weights[name], WEIGHTS[name]) for name in WEIGHTS)


def test_a_lora_of_another_model_is_counted_and_refused(tmp_path: Path) -> None:
    path = write("diffusers", tmp_path / "lora.safetensors")
    with pytest.raises(UsageError, match="4 tensors belong to this model and 4 do not, for example transformer"):
        read_lora(path, MODULES[:2], "sample.lora")


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("inf"), float("nan")])
def test_an_alpha_that_scales_to_nothing_is_refused(alpha: float, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(pack_lora(WEIGHTS, diffusers_settings({"lora_alpha": alpha})))
    with pytest.raises(UsageError, match="alpha must be positive, got"):
        read_lora(path, MODULES, "sample.lora")


def test_a_weight_under_another_name_is_found(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    packed = pack_lora({f"transformer.{name}": value for name, value in WEIGHTS.items()}, {"precog_view": "abc"})
    path.write_bytes(packed.replace(b"blocks.1", b"blocks.2"))
    with pytest.raises(DataError, match="sha256"):
        read_lora(path, [name.replace("blocks.1", "blocks.2") for name in MODULES], "sample.lora")


def test_every_flipped_bit_of_an_export_is_found(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    tensors = {f"transformer.{name}": value for name, value in WEIGHTS.items()}
    path.write_bytes(pack_lora(tensors, diffusers_settings({"lora_alpha": 10}) | {"precog_view": "abc"}))
    assert read_lora(path, MODULES, "sample.lora").alpha == 10
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(100):
        damaged, bit = bytearray(whole), draw.randrange(8 * len(whole))
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises((UsageError, DataError)) as error:
            read_lora(path, MODULES, "sample.lora")
        assert "\n" not in str(error.value)

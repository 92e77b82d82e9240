"""LoRAs that `precog sample` finds, and those that it refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bench.models import published_conventions
from sample.cli import lora_override
from sample.loras import Lora, load_lora, lora_file, warn_of_differences
from shared.config_file import load_config
from shared.errors import UsageError
from tests.tiny import build_pipeline, build_transformer
from train.transformer.load import adapter_weights

DEMO = Path(__file__).parents[2] / "configs" / "demo.toml"


def lora(path: Path) -> Lora:
    return Lora("lora x1", "lora0", path, path, 1.0, "")


@pytest.fixture
def pipeline() -> Any:
    return build_pipeline("2b")


def weights() -> dict[str, torch.Tensor]:
    """Return the tensors of a LoRA whose alpha is its rank."""
    found = adapter_weights(build_transformer("2b", lora_rank=4))
    alphas = {f"{name.partition('.lora_')[0]}.alpha": torch.tensor(4.0) for name in found}
    return {f"transformer.{name}": tensor.contiguous() for name, tensor in (found | alphas).items()}


def test_a_file_that_is_no_adapter_of_the_model_is_refused(pipeline: Any, tmp_path: Path) -> None:
    layer = "transformer.transformer_blocks.0.attn1.to_q"
    torn, foreign, other = (tmp_path / f"{name}.safetensors" for name in ("torn", "foreign", "other"))
    torn.write_bytes(b"\x40\0\0\0\0\0\0\0{")
    shapes = {f"{layer}.lora_A.weight": torch.ones(4, 7), f"{layer}.lora_B.weight": torch.ones(7, 4)}
    save_file(shapes | {f"{layer}.alpha": torch.tensor(4.0)}, foreign)
    save_file({"weight": torch.zeros(4)}, other)
    lines = ("cannot be read as a LoRA", "not an adapter of", "0 tensors belong to this model and 1 do not")
    for path, line in zip((torn, foreign, other), lines, strict=True):
        with pytest.raises(UsageError, match=rf"{path.name}'?: {line}") as error:
            load_lora(pipeline, lora(path))
        assert "\n" not in str(error.value)


def test_an_adapter_that_changes_nothing_or_is_not_complete_is_refused(pipeline: Any, tmp_path: Path) -> None:
    zero, half = tmp_path / "zero.safetensors", tmp_path / "half.safetensors"
    save_file({name: tensor * ("lora_B" not in name) for name, tensor in weights().items()}, zero)
    with pytest.raises(UsageError, match=r"zero\.safetensors: every lora_B is zero, so the adapter changes nothing"):
        load_lora(pipeline, lora(zero))
    save_file({name: tensor for name, tensor in weights().items() if "1.attn1.to_q.lora_B" not in name}, half)
    with pytest.raises(UsageError, match=r"15 tensors applied, 1 missing, for example .*1\.attn1\.to_q\.lora_B"):
        load_lora(pipeline, lora(half))


@pytest.mark.parametrize(
    ("text", "place", "strength"),
    [("runs/a", "runs/a", 1.0), ("runs/a@best:0.5", "runs/a@best", 0.5), ("a:b@300:1.25", "a:b@300", 1.25)],
)
def test_an_option_names_run_step_and_strength(text: str, place: str, strength: float) -> None:
    (found,) = load_config(DEMO, [f"sample.loras=[{lora_override(text)}]"]).sample.loras
    assert (str(found.path), found.strength) == (place, strength)


def test_a_place_is_the_file_in_it(tmp_path: Path) -> None:
    run, odd = tmp_path / "run", tmp_path / "odd@name"
    files = {
        "run": run / "export" / "pytorch_lora_weights.safetensors",
        "run@best": run / "export" / "best" / "pytorch_lora_weights.safetensors",
        "run@300": run / "checkpoint-000300" / "adapter.safetensors",
        "run/checkpoint-000300": run / "checkpoint-000300" / "adapter.safetensors",
        "odd@name": odd / "pytorch_lora_weights.safetensors",
    }
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert {place: lora_file(tmp_path / place) for place in files} == files
    (tmp_path / "stopped" / "checkpoint-000020").mkdir(parents=True)
    (tmp_path / "stopped" / "checkpoint-000020" / "adapter.safetensors").touch()
    assert lora_file(tmp_path / "stopped").parent.name == "checkpoint-000020"
    for place in ("run@400", "run@last", "none"):
        with pytest.raises(UsageError, match=rf"sample\.loras: .*{place}: adapter not found"):
            lora_file(tmp_path / place)


def test_another_base_schedule_or_precision_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = {"base_model": "CogVideoX-5b", "revision": "", "precision": "float32", "snr_shift_scale": "1"}
    config = load_config(DEMO, ["model.pretrained_model_name_or_path=CogVideoX-2b"])
    conventions = published_conventions("2b")
    header = {f"precog_{name}": value for name, value in header.items()}
    warn_of_differences(Path("lora"), header, config, replace(conventions, snr_shift_scale=3.0), "bfloat16")
    said = " ".join(capsys.readouterr().err.split())
    assert said == (
        "warning: lora: trained with base_model 'CogVideoX-5b', here 'CogVideoX-2b'; precision 'float32', here "
        "'bfloat16'; snr_shift_scale '1', here '3'"
    )
    warn_of_differences(Path("lora"), {}, config, conventions, "bfloat16")
    assert capsys.readouterr().err == ""

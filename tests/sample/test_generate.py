"""Tests of the adapters that `precog sample` refuses; tests/train/test_preview.py compares videos."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sample.generate import load_adapter, load_pipeline
from shared.config import Config, Data, Model, Precompute, Train
from shared.errors import UsageError
from tests.tiny import build_transformer, save_pipeline
from train.transformer.load import adapter_weights


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("sample")
    save_pipeline("2b", folder / "model")
    return Config(
        model=Model(pretrained_model_name_or_path=str(folder / "model")),
        data=Data(name="none", instance_data_root=folder),
        precompute=Precompute(cache=str(folder / "cache")),
        train=Train(output_dir=folder / "run"),
    )


@pytest.fixture
def pipeline(config: Config) -> Any:
    return load_pipeline(config)[0]


def test_a_file_that_is_no_adapter_of_the_model_is_refused(pipeline: Any, tmp_path: Path) -> None:
    layer = "transformer.transformer_blocks.0.attn1.to_q"
    torn, foreign, other = (tmp_path / f"{name}.safetensors" for name in ("torn", "foreign", "other"))
    torn.write_bytes(b"\x40\0\0\0\0\0\0\0{")
    save_file({f"{layer}.lora_A.weight": torch.zeros(4, 7), f"{layer}.lora_B.weight": torch.zeros(7, 4)}, foreign)
    save_file({"weight": torch.zeros(4)}, other)
    for path in (torn, foreign, other):
        with pytest.raises(UsageError, match=f"{path.name}: not an adapter of") as error:
            load_adapter(pipeline, path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prefix", "scale", "line"),
    [
        ("", 1.0, "none of its tensors belongs to .*; use the adapter of a run's export/"),
        ("transformer.", 0.0, "every lora_B is zero, so the adapter changes nothing"),
    ],
    ids=["a checkpoint's file", "an untrained adapter"],
)
def test_an_adapter_that_changes_nothing_is_refused(
    prefix: str, scale: float, line: str, pipeline: Any, tmp_path: Path
) -> None:
    weights = adapter_weights(build_transformer("2b", lora_rank=4))
    path = tmp_path / "adapter.safetensors"
    scaled = {name: tensor * (scale if "lora_B" in name else 1.0) for name, tensor in weights.items()}
    save_file({f"{prefix}{name}": tensor for name, tensor in scaled.items()}, path)
    with pytest.raises(UsageError, match=rf"adapter\.safetensors: {line}"):
        load_adapter(pipeline, path)


def test_a_trained_adapter_is_accepted(pipeline: Any, tmp_path: Path) -> None:
    weights = adapter_weights(build_transformer("2b", lora_rank=4))
    path = tmp_path / "lora.safetensors"
    save_file({f"transformer.{name}": tensor.contiguous() for name, tensor in weights.items()}, path)
    load_adapter(pipeline, path)
    assert any(bool(value.any()) for name, value in pipeline.transformer.named_parameters() if "lora_B" in name)

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
    save_file({f"{layer}.lora_A.weight": torch.ones(4, 7), f"{layer}.lora_B.weight": torch.ones(7, 4)}, foreign)
    save_file({"weight": torch.zeros(4)}, other)
    lines = ("cannot be read as a LoRA", "not an adapter of", "0 tensors belong to this model and 1 do not")
    for path, line in zip((torn, foreign, other), lines, strict=True):
        with pytest.raises(UsageError, match=rf"{path.name}'?: {line}") as error:
            load_adapter(pipeline, path)
        assert "\n" not in str(error.value)


def test_an_adapter_that_changes_nothing_is_refused(pipeline: Any, tmp_path: Path) -> None:
    weights = adapter_weights(build_transformer("2b", lora_rank=4))
    path = tmp_path / "adapter.safetensors"
    save_file({name: tensor * ("lora_A" in name) for name, tensor in weights.items()}, path)
    with pytest.raises(UsageError, match=r"adapter\.safetensors: every lora_B is zero, so the adapter changes nothing"):
        load_adapter(pipeline, path)


def test_a_trained_adapter_is_accepted(pipeline: Any, tmp_path: Path) -> None:
    weights = adapter_weights(build_transformer("2b", lora_rank=4))
    path = tmp_path / "lora.safetensors"
    save_file({f"transformer.{name}": tensor.contiguous() for name, tensor in weights.items()}, path)
    load_adapter(pipeline, path)
    assert any(bool(value.any()) for name, value in pipeline.transformer.named_parameters() if "lora_B" in name)

"""What `precog sample` says of adapters that it cannot use; videos are compared in tests/train/test_preview.py."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sample.generate import load_adapter, load_pipeline
from shared.config import Config, Data, Model, Precompute, Train
from shared.errors import UsageError
from tests.tiny import save_pipeline


def test_a_file_that_is_no_adapter_of_this_model_is_one_line(tmp_path: Path) -> None:
    save_pipeline("2b", tmp_path / "model")
    config = Config(
        model=Model(pretrained_model_name_or_path=str(tmp_path / "model")),
        data=Data(name="none", instance_data_root=tmp_path),
        precompute=Precompute(cache=str(tmp_path / "cache")),
        train=Train(output_dir=tmp_path / "run"),
    )
    pipeline, _ = load_pipeline(config)
    layer = "transformer.transformer_blocks.0.attn1.to_q"
    torn, foreign, other = (tmp_path / f"{name}.safetensors" for name in ("torn", "foreign", "other"))
    torn.write_bytes(b"\x40\0\0\0\0\0\0\0{")
    save_file({f"{layer}.lora_A.weight": torch.zeros(4, 7), f"{layer}.lora_B.weight": torch.zeros(7, 4)}, foreign)
    save_file({"weight": torch.zeros(4)}, other)
    for path in (torn, foreign, other):
        with pytest.raises(UsageError, match=f"{path.name}: not an adapter of") as error:
            load_adapter(pipeline, path)
        assert "\n" not in str(error.value)

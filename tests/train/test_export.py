"""The exported file is what diffusers loads: same numbers, its own alpha, and it changes the video."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from shared.config import Train
from shared.errors import DataError, UsageError
from tests import tiny
from train.export import export_adapter, read_adapter
from train.transformer.load import adapter_weights, add_adapter


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, torch.Tensor, dict[str, torch.Tensor]]:
    """Return the file of an adapter with alpha / rank = 2.5, the transformer's output with it, and its weights."""
    train = Train(output_dir=tmp_path, lora_rank=4, lora_alpha=10)
    transformer = tiny.build_transformer("2b")
    add_adapter(transformer, train)
    transformer.eval()
    for name, tensor in adapter_weights(transformer).items():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=0.1)
    path = export_adapter(transformer, train, tmp_path / "export", {"precog_view": "abc"})
    return path, output(transformer), adapter_weights(transformer)


def output(transformer: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        result: torch.Tensor = transformer(
            hidden_states=torch.randn(1, 3, 16, 8, 12, generator=generator),
            encoder_hidden_states=torch.randn(1, tiny.TEXT_LENGTH, tiny.TEXT_WIDTH, generator=generator),
            timestep=torch.tensor([500]),
            return_dict=False,
        )[0]
    return result


def test_the_file_carries_weights_settings_and_origin(
    exported: tuple[Path, torch.Tensor, dict[str, torch.Tensor]],
) -> None:
    path, _, weights = exported
    stored = load_file(path)
    assert {name.removeprefix("transformer.") for name in stored} == set(weights)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    settings = json.loads(metadata["lora_adapter_metadata"])
    assert (settings["transformer.r"], settings["transformer.lora_alpha"]) == (4, 10)
    assert metadata["precog_view"] == "abc"


def test_a_disk_that_fails_leaves_the_earlier_export(
    exported: tuple[Path, torch.Tensor, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, train = exported[0], Train(output_dir=exported[0].parent, lora_rank=4, lora_alpha=10)
    before, transformer = path.read_bytes(), tiny.build_transformer("2b")
    add_adapter(transformer, train)

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        export_adapter(transformer, train, path.parent, {})
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]


def test_an_export_is_durable_before_it_has_its_name(
    exported: tuple[Path, torch.Tensor, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, train, synced = exported[0], Train(output_dir=exported[0].parent, lora_rank=4), list[str]()
    transformer = tiny.build_transformer("2b")
    add_adapter(transformer, train)
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").readlink().name))
    export_adapter(transformer, train, path.parent, {})
    assert synced == [f".tmp-{path.name}", path.parent.name]


def test_an_adapter_of_other_sizes_is_refused(
    exported: tuple[Path, torch.Tensor, dict[str, torch.Tensor]],
) -> None:
    path, _, weights = exported
    train = Train(output_dir=path.parent, lora_rank=4, lora_alpha=10)
    same, wider = tiny.build_transformer("2b"), tiny.build_transformer("2b", num_attention_heads=6)
    for transformer in (same, wider):
        add_adapter(transformer, train)
    found = read_adapter(same, train, path)
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)
    with pytest.raises(UsageError, match=r"lora_A\.weight of shape \(4, 96\), got \(4, 64\)"):
        read_adapter(wider, train, path)
    for change, line in (
        ({"lora_rank": 8}, r"expected lora_rank 8, got 4; set train\.lora_rank=4"),
        ({"lora_alpha": 1.0}, "expected lora_alpha 1.0, got 10.0"),
        ({"use_rslora": True}, "expected use_rslora True, got False"),
    ):
        with pytest.raises(UsageError, match=line):
            read_adapter(same, train.model_copy(update=change), path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_adapter(same, train, path / "nowhere")


def test_a_file_that_is_no_lora_of_the_model_is_one_line(
    exported: tuple[Path, torch.Tensor, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    transformer, train = tiny.build_transformer("2b"), Train(output_dir=tmp_path, lora_rank=4, lora_alpha=10)
    add_adapter(transformer, train)
    whole = exported[0].read_bytes()
    stored = load_file(exported[0])
    other = {"transformer.transformer_blocks.7.attn1.to_q.lora_A.weight": torch.ones(4, 64)}
    named = {f"double_blocks.{name}": value for name, value in stored.items()}
    wrong = {
        "text": b"a text file\n",
        "another model": save(stored | other),
        "zero match": save(named),
        "flipped bit": whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:],
    }
    lines = {}
    for name, content in wrong.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises((UsageError, DataError)) as error:
            read_adapter(transformer, train, tmp_path / name)
        lines[name] = str(error.value)
        assert "\n" not in lines[name] and name in lines[name], lines[name]
    assert "cannot be read as a LoRA" in lines["text"]
    assert "16 tensors belong to this model and 1 do not" in lines["another model"]
    assert "0 tensors belong to this model and 16 do not" in lines["zero match"]
    assert "sha256 is not the one in the header" in lines["flipped bit"]

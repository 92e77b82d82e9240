"""Prompts from files and from the cache, without T5 where all are stored."""

import shutil
from pathlib import Path

import pytest
import torch

from sample.generate import sample
from sample.pipeline import checkpoint_conventions
from sample.prompts import cached_embeds, embed_prompts, encode, read_prompts
from shared.config import Config, Sampling
from shared.errors import UsageError
from tests.experiments import changed
from tests.tiny import build_transformer, save_pipeline
from train.export import export_adapter

CPU = torch.device("cpu")


def captions(config: Config) -> list[str]:
    return (config.data.instance_data_root / "prompts.txt").read_text("utf-8").splitlines()


def test_stored_prompts_need_no_text_encoder(experiment: Config, tmp_path: Path) -> None:
    """The caption of a clip and the empty negative prompt are stored."""
    model = tmp_path / "model"
    shutil.copytree(experiment.model.pretrained_model_name_or_path, model)
    shutil.rmtree(model / "text_encoder")
    export_adapter(build_transformer("2b", lora_rank=4), experiment.train, tmp_path / "run" / "export", {})
    settings = Sampling(
        prompts=(captions(experiment)[0],),
        output_dir=tmp_path,
        num_frames=9,
        height=32,
        width=48,
        num_inference_steps=1,
    )
    run_folder = {"output_dir": tmp_path / "run"}
    config = changed(experiment, model={"pretrained_model_name_or_path": str(model)}, train=run_folder)
    config = config.model_copy(update={"sample": settings})
    assert sample(config)["made"] == 2
    with pytest.raises(UsageError, match="text_encoder/ not found"):
        embed_prompts(config, ["a prompt that is not stored"], checkpoint_conventions(config), CPU)


def test_stored_prompts_are_those_of_the_text_encoder(experiment: Config) -> None:
    text = captions(experiment)[1]
    stored = cached_embeds(experiment, [text, "not stored"])
    made = encode(experiment, [text], checkpoint_conventions(experiment), CPU)
    assert list(stored) == [text]
    torch.testing.assert_close(stored[text], made[text])


def test_prompts_of_another_text_encoder_are_not_taken(
    experiment: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"pretrained_model_name_or_path": str(save_pipeline("2b", tmp_path / "other", seed=1))}
    assert cached_embeds(changed(experiment, model=other), captions(experiment)) == {}
    assert "prompts are not read from the cache" in capsys.readouterr().err
    fp16 = changed(experiment, precompute={"text_dtype": "fp16"})
    assert cached_embeds(fp16, captions(experiment)) == {}


def test_a_prompt_without_the_trigger_is_said(
    experiment: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffa dog\r\n\r\n a cat \n".encode())
    given = {"prompts": ("one",), "prompts_file": tmp_path / "prompts.txt"}
    config = changed(experiment, data={"id_token": "zorp"}, sample=given)
    assert read_prompts(config) == ["one", "a dog", "a cat"]
    assert "no prompt has data.id_token = 'zorp'" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UsageError, match=r"sample\.prompts_file: .*prompts\.txt cannot be read"):
        read_prompts(config)

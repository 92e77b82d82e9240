"""`precog caption --engine transformers`: a local vision-language model, end to end."""

from pathlib import Path

import pytest

from tests.raw_videos import precog, report_of, rows_of, write_project
from tests.tiny_vlm import WORDS, save_vlm


def test_a_local_model_captions_every_clip(tmp_path: Path) -> None:
    config = write_project(tmp_path, ["a.mp4", "b.mp4", "c.mp4"])
    model = save_vlm(tmp_path / "vlm")
    options = ("--engine=transformers", f"--model={model}", "--frames=3", "--json")
    report = report_of(precog("caption", config, *options))
    assert report["files"] == {} and report["summary"]["answers asked for"] == 3
    captions = [row["text"] for row in rows_of(tmp_path / "dog.jsonl")]
    assert all(set(caption.split()) <= set(WORDS) for caption in captions) and all(captions)
    assert report_of(precog("caption", config, *options))["summary"]["answers asked for"] == 0


def test_a_local_answer_that_does_not_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prepare.engines.MAX_ANSWER_TOKENS", 32)
    config = write_project(tmp_path, ["a.mp4"])
    model = save_vlm(tmp_path / "vlm", ends=False)
    report = report_of(precog("caption", config, "--engine=transformers", f"--model={model}", "--frames=1", "--json"))
    assert report["files"]["a.mp4"].startswith("cut off after 32 tokens")
    assert rows_of(tmp_path / "dog.jsonl")[0]["text"] == ""


def test_a_model_that_cannot_be_loaded_ends_in_one_line(tmp_path: Path) -> None:
    config = write_project(tmp_path, ["a.mp4"])
    result = precog("caption", config, "--engine=transformers", f"--model={tmp_path / 'nothing'}")
    assert result.exit_code == 2 and "cannot be loaded" in result.stderr

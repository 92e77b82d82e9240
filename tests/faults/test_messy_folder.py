"""Forty files as people have them become a LoRA through three commands; everything left out is named."""

import json
import unicodedata
from pathlib import Path

import pytest

from tests.media import write_clip, write_text
from tests.raw_videos import precog, report_of, write_video

ODD_NAMES = ("take:1", "a\\b", "new\nline", "cafe\u0301", "\u732b 😀", "-dash", " space", "x" * 200)
STRAY = ("notes.txt", "LICENSE.txt", ".DS_Store", "Thumbs.db", "README", "cover.jpg")


def write_messy_folder(root: Path) -> None:
    for number in range(5):
        for name, options in ((f"land{number}", {}), (f"phones/up{number}", {"rotation": 90})):
            write_video(root / f"{name}.mp4", frames=10 + number, **options)
            (root / f"{name}.txt").write_text(f"a dog runs, {name}", "utf-8")
    for name in ODD_NAMES:
        write_video(root / f"{name}.mp4")
        caption = unicodedata.normalize("NFC", name)
        (root / f"{caption}.txt").write_text(f"a dog sits, {len(name)}", "utf-8")
    hdr = {"color_trc": "smpte2084", "color_primaries": "bt2020", "colorspace": "bt2020nc"}
    write_clip(
        root / "hdr.mp4", height=256, width=384, frames=12, rate=8, codec="libx265", pixels="yuv420p10le", options=hdr
    )
    uneven = [0, 40, 90, 125, 400, 410, 500, 700, 930, 1000, 1200, 1210, 1500, 1600]
    write_clip(root / "vfr.mp4", height=256, width=384, frames=len(uneven), times=uneven)
    for name in ("bare.mp4", "empty.mp4", "utf16.mp4"):
        write_video(root / name, frames=11)
    (root / "empty.txt").write_text(" \n")
    (root / "utf16.txt").write_text("a dog", "utf-16")
    write_text(root / "broken.mp4")
    write_video(root / "short.mp4", frames=3)
    for name in STRAY:
        (root / name).write_text("x")
    for name in ("hdr", "vfr"):
        (root / f"{name}.txt").write_text(f"a dog in {name}", "utf-8")


@pytest.mark.faults
def test_three_commands_make_a_lora_from_a_messy_folder(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_messy_folder(tmp_path / "raw")
    made = report_of(precog("init", "dog", "--videos=raw", "--model=2b", "--json"))
    assert {"broken.mp4", "short.mp4", *STRAY} - {".DS_Store"} <= made["files"].keys()
    assert {"bare.mp4", "empty.mp4", "utf16.mp4"} <= set(made["summary"]["rows without a caption"])
    small = [f"model.pretrained_model_name_or_path={pipeline}", "data.resolution_buckets=64x96,96x64"]
    small += ["data.held_out_clips=1", "precompute.device=cpu", "data.frame_buckets=[9]"]
    encoded = precog("precompute", "dog.toml", "--json", *small)
    assert encoded.exit_code == 0, encoded.stderr
    report = json.loads(encoded.stdout)
    reasons = {skip["source"]: skip["reason"] for skip in report["skipped"]}
    for name in ("bare.mp4", "empty.mp4", "utf16.mp4"):
        assert reasons.pop(name) == "no caption: write one, or set data.default_caption"
    assert reasons == {} and report["clips"] == 10 + len(ODD_NAMES) + 2
    listed = tmp_path / "runs/dog-data/leave_out.txt"
    kept = report_of(precog("report", "data", "dog.toml", "--json", *small))["verdict"]
    assert kept == "4 clips usable, 16 to look at, 3 left out."  # of the copies of one file, one is usable
    fewer = report_of(precog("precompute", "dog.toml", "--json", *small, f"data.leave_out={listed}"))
    assert fewer["clips"] == 4
    steps = ["train.max_train_steps=4", "train.device=cpu", "train.checkpointing_steps=4", "train.validation_steps=4"]
    trained = precog("train", "dog.toml", *small, *steps, "train.lora_rank=4", "train.lr_warmup_steps=1")
    assert trained.exit_code == 0, trained.stderr
    assert list((tmp_path / "runs/dog/export").glob("*.safetensors"))

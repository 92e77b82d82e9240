"""`precog init`: a folder as people have it becomes a config and a table that stage 1 reads."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from prepare.folder import look_into
from prepare.project import MODELS, Buckets, choose_buckets, config_text
from prepare.videos import VideoSummary
from shared.config_file import load_config
from shared.model.conventions import refusal
from shared.model.geometry import Bucket
from tests.media import write_clip, write_text
from tests.raw_videos import precog, report_of, rows_of, write_table, write_video


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Landscape, portrait by rotation, captions of three kinds, and what should be left out."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "raw"
    write_video(root / "land.mp4")
    write_video(root / "phones" / "turned.mp4", rotation=90)
    write_video(root / "listed.mkv", frames=20)
    write_video(root / "tabled é.mp4", height=270, width=480)
    write_video(root / "bare.mp4", frames=10)
    write_video(root / "short.mp4", frames=4)
    write_video(root / "small.mp4", height=48, width=64)
    write_text(root / "broken.mp4")
    (root / "land.txt").write_text("sks dog, a dog\nruns\n", "utf-8")
    (root / "metadata.csv").write_text("text,file_name\nanother,land.mp4\n", "utf-8")
    (root / "prompts.txt").write_text("sks dogs swim\na dog, asleep\n", "utf-8")
    (root / "videos.txt").write_text("listed.mkv\ntabled e\u0301.mp4\n", "utf-8")
    (root / "notes.txt").write_text("to do", "utf-8")
    (root / "cover.jpg").write_bytes(b"jpeg")
    (root / "away.mp4").symlink_to(write_video(tmp_path / "elsewhere" / "away.mp4"))
    (root / ".hidden").mkdir()
    return root


def test_a_messy_folder_becomes_a_table_and_a_config(folder: Path) -> None:
    report = report_of(
        precog("init", "dog", "--videos=raw", "--model=5b", "--card=4090", "--trigger=sks dog", "--json")
    )
    assert rows_of(Path("dog.jsonl")) == [
        {"video": "bare.mp4", "text": ""},
        {"video": "land.mp4", "text": "a dog runs"},
        {"video": "listed.mkv", "text": "sks dogs swim"},
        {"video": "phones/turned.mp4", "text": ""},
        {"video": "tabled é.mp4", "text": "a dog, asleep"},
    ]
    assert report["summary"]["rows without a caption"] == ["bare.mp4", "phones/turned.mp4"]
    assert {name: reason.split(":")[0] for name, reason in report["files"].items()} == {
        "broken.mp4": "not a video",
        "away.mp4": "path 'away.mp4' is a link that leaves the data root; --follow-links takes it",
        "metadata.csv": "not a video",
        "cover.jpg": "not a video",
        "notes.txt": "not a video",
        "short.mp4": "too short",
        "small.mp4": "too few pixels",
    }
    config = load_config(Path("dog.toml"))
    assert config.data.id_token == "sks dog" and config.data.frame_buckets == (9, 17)
    assert config.data.resolution_buckets == ((480, 720), (720, 480)) and config.data.held_out_clips == 1
    assert config.train.lora_rank == 32 and config.memory.base_precision == "model"
    assert config.data.validation_prompts == ("sks dog a dog runs", "sks dog sks dogs swim")


def test_a_rerun_adds_new_videos_and_changes_nothing_else(folder: Path) -> None:
    command = ("init", "dog", "--videos=raw", "--model=5b", "--json")
    precog(*command)
    rows = rows_of(Path("dog.jsonl"))
    rows[0] |= {"text": "edited by hand", "start_seconds": 0.25}
    write_table(Path("dog.jsonl"), rows)
    with Path("dog.toml").open("a", encoding="utf-8") as config:
        config.write("# edited\n")
    before = Path("dog.toml").read_bytes()
    shutil.copy("raw/land.mp4", "raw/zebra.mp4")
    report = report_of(precog(*command))
    assert report["summary"]["new rows"] == ["zebra.mp4"] and "dog.toml is kept as it is" in report["notes"]
    assert rows_of(Path("dog.jsonl")) == [*rows, {"video": "zebra.mp4", "text": ""}]
    assert Path("dog.toml").read_bytes() == before


def test_stage_1_reads_what_init_wrote(folder: Path, pipeline: Path) -> None:
    assert precog("init", "dog", "--videos=raw", "--model=2b").exit_code == 0
    overrides = (f"model.pretrained_model_name_or_path={pipeline}", "data.resolution_buckets=[[32, 48], [48, 32]]")
    made = report_of(precog("precompute", "dog.toml", *overrides, "precompute.device=cpu", "--json"))
    assert made["clips"] == made["latents"]["encoded"] == 3
    no_caption = "no caption: write one, or set data.default_caption"
    assert {row["source"]: row["reason"] for row in made["skipped"]} == dict.fromkeys(
        ["bare.mp4", "phones/turned.mp4"], no_caption
    )


def test_a_folder_without_a_usable_video_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "film.mp4")
    for arguments, code, words in (
        (("--videos=.",), 3, "no video can be used; film.mp4: not a video"),
        (("--videos=nowhere",), 3, "nowhere: not a folder"),
        (("--videos=.", "--card=5099"), 2, "--card '5099': unknown card; did you mean 5090?"),
    ):
        result = precog("init", "dog", "--model=5b", *arguments)
        assert result.exit_code == code and words in result.stderr
    assert precog("init", "my dog", "--model=5b", "--videos=.").exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]


def test_caption_lists_that_may_be_shifted_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / "raw" / name)
    (tmp_path / "raw" / "prompts.txt").write_text("one\n\ntwo\n", "utf-8")
    (tmp_path / "raw" / "videos.txt").write_text("a.mp4\nb.mp4\n\n", "utf-8")
    report = report_of(precog("init", "dog", "--videos=raw", "--model=5b", "--json"))
    assert report["summary"]["rows without a caption"] == ["a.mp4", "b.mp4"]
    assert "captions are not used: prompts.txt: line 2 is blank, so that pairs may be shifted" in report["notes"][0]


@pytest.mark.parametrize(
    ("model", "video", "size"),
    [
        ("5b", (1080, 1920), (480, 720)),
        ("5b", (1920, 1080), (720, 480)),
        ("2b", (1080, 1440), (480, 720)),
        ("5b", (1080, 1080), (480, 480)),
        ("2b", (800, 1920), (304, 720)),
        ("5b-i2v", (1920, 1080), (480, 720)),
        ("1.5-5b", (1080, 1920), (768, 1360)),
        ("1.5-5b", (1440, 1080), (1024, 768)),
        ("1.5-5b-i2v", (800, 1920), (768, 1360)),
    ],
)
def test_the_bucket_follows_the_shape_of_the_video(model: str, video: tuple[int, int], size: tuple[int, int]) -> None:
    choice = MODELS[model]
    found = choose_buckets({"a": VideoSummary(10.0, *video)}, choice)
    assert found.sizes == {"a": size} and found.frames[-1] == choice.frames[-1]
    assert all(refusal(choice.conventions, Bucket(frames, *size)) is None for frames in found.frames)
    assert all(frames % 8 == 1 for frames in found.frames)


def test_steps_and_memory_follow_clips_and_card(tmp_path: Path) -> None:
    rows = [{"video": f"{number}.mp4", "text": ""} for number in range(60)]
    buckets = Buckets((9, 17), {row["video"]: (480, 720) for row in rows}, {}, ())
    for name, model, gib in (("small", "5b", 4.0), ("large", "2b", 80.0)):
        text = config_text(name, tmp_path, tmp_path / f"{name}.jsonl", model, buckets, rows, "", gib)
        (tmp_path / f"{name}.toml").write_text(text, "utf-8")
    small, large = load_config(tmp_path / "small.toml"), load_config(tmp_path / "large.toml")
    assert small.memory.base_precision == "int8" and small.precompute.enable_tiling
    assert large.memory.base_precision == "model" and not large.precompute.enable_tiling
    assert (large.train.max_train_steps, large.train.learning_rate, large.train.lora_rank) == (2400, 1e-3, 64)
    assert large.data.held_out_clips == 6


@pytest.mark.parametrize(
    ("file", "options", "frames"),
    [
        ("turned.mp4", {"rotation": 90}, 12),
        ("raw.h264", {"codec": "libx264"}, 12),
        ("held.mp4", {"codec": "libx264", "times": [*range(0, 1500, 125), 4000]}, 33),
        ("moving.gif", {"codec": "gif", "pixels": "rgb8", "rate": 10}, 10),
    ],
)
def test_lengths_and_sizes_are_those_of_stage_1(
    file: str, options: dict[str, Any], frames: int, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"codec": "mpeg4", "bframes": 0, "rate": 8, "height": 256, "width": 384}
    write_clip(tmp_path / file, **given | {"frames": len(options.get("times", range(12)))} | options)
    video = look_into(tmp_path).videos[file]
    size = (384, 256) if "rotation" in options else (256, 384)
    assert (video.height, video.width, video.frames_at(8)) == (*size, frames)


def test_links_out_of_the_folder_are_taken_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "a.mp4").symlink_to(write_video(tmp_path / "blobs" / "111.mp4"))
    refused = precog("init", "dog", "--videos=snapshot", "--model=5b")
    assert refused.exit_code == 3 and "a link that leaves the data root; --follow-links takes it" in refused.stderr
    assert precog("init", "dog", "--videos=snapshot", "--model=5b", "--follow-links").exit_code == 0
    assert load_config(Path("dog.toml")).data.follow_links

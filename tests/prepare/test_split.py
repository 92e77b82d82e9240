"""`precog split`: scene changes become rows of the table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from prepare.split import find_scenes, keep_scenes
from prepare.videos import probe, sample_frames
from shared.config import Precompute
from shared.media.pool import decode_pool
from tests.raw_videos import Row, precog, report_of, rows_of, write_project, write_table

LENGTHS = (30, 41, 24, 36, 29, 40)
"""Frames of six scenes."""
CUTS = [30, 71, 95, 131, 160]
RATE = 25


def write_film(path: Path, lengths: Sequence[int] = LENGTHS, *, starts_late_seconds: float = 0) -> Path:
    """Scenes of different blocks of color with a moving bar; with a late start, sound begins before the pictures."""
    draws = np.random.default_rng(7)
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        sound: Any = out.add_stream("aac", rate=16000) if starts_late_seconds else None
        number = round(starts_late_seconds * RATE)
        for length in lengths:
            scene = draws.integers(0, 256, (3, 5, 3), np.uint8).repeat(32, 0).repeat(32, 1)
            for index in range(length):
                picture = scene.copy()
                picture[:, index * 2 : index * 2 + 8] = 255
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, number = number, number + 1
                out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if sound:
            for block in range(8):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                silence.sample_rate, silence.pts = 16000, block * 1024
                out.mux(sound.encode(silence))
            out.mux(sound.encode(None))
    return path


def test_six_scenes_give_five_cuts_within_one_frame(tmp_path: Path) -> None:
    scenes = find_scenes(write_film(tmp_path / "film.mp4"))
    assert len(scenes) == 6
    assert [start * RATE for start, _ in scenes[1:]] == pytest.approx(CUTS, abs=1)
    assert [end for _, end in scenes[:-1]] == [start for start, _ in scenes[1:]]


def test_scene_times_count_from_the_start_of_the_container(tmp_path: Path) -> None:
    scenes = find_scenes(write_film(tmp_path / "film.mkv", starts_late_seconds=2))
    assert [start * RATE - 50 for start, _ in scenes[1:]] == pytest.approx(CUTS, abs=1)


def test_rows_of_films_become_rows_of_scenes(tmp_path: Path) -> None:
    config = write_project(tmp_path, ["one.mp4"])
    film, table = write_film(tmp_path / "videos" / "film.mp4"), tmp_path / "dog.jsonl"
    kept: list[Row] = [{"video": "one.mp4", "text": "a"}, {"video": "film.mp4", "text": "b", "start_seconds": 1.5}]
    broken = {"video": "no.mp4", "text": ""}
    write_table(table, [{"video": "film.mp4", "text": "all six", "loss_weight": 2}, *kept, broken])
    report = report_of(precog("split", config, "--min-seconds=1", "--json"))
    rows = rows_of(table)
    assert [row["video"] for row in rows] == ["film.mp4"] * 5 + ["one.mp4", "film.mp4", "no.mp4"]
    assert rows[5:] == [*kept, broken]  # a single scene, a window, and a file that cannot be read stay
    assert all(row["text"] == "all six" and row["loss_weight"] == 2 for row in rows[:5])  # frames 71 to 95 are 0.96 s
    assert [round(row["start_seconds"] * RATE) for row in rows[:5]] == [0, 30, 95, 131, 160]
    assert list(report["files"]) == ["film.mp4", "no.mp4"] and len(report["summary"]["scenes"]["film.mp4"]) == 5
    with decode_pool(Precompute(cache="none")) as pool:
        for row, number in zip(rows[:5], (0, 1, 3, 4, 5), strict=True):  # a window shows its own scene alone
            pictures = sample_frames(pool, film, probe(pool, film), 2, row["start_seconds"], row["end_seconds"])
            first, last = (np.asarray(image, int) for image in pictures)
            assert abs(first[64:] - last[64:]).mean() < 30, number

    before = table.read_bytes()
    assert report_of(precog("split", config, "--json"))["summary"]["videos cut"] == 0
    assert table.read_bytes() == before


def test_the_longest_scenes_are_kept_in_order() -> None:
    scenes = [(0.0, 2.0), (2.0, 3.0), (3.0, 6.0), (6.0, 8.0), (8.0, 8.5)]
    assert keep_scenes(scenes, 1.0, None) == scenes[:4]
    assert keep_scenes(scenes, 0.0, 2) == [(0.0, 2.0), (3.0, 6.0)]
    assert keep_scenes(scenes, 9.0, 2) == []

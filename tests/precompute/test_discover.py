"""What is known before a model is loaded, and what of it is kept."""

import tracemalloc
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from precompute.assignments import Part
from precompute.discover import Stage, cut_clips, open_stage
from shared.media.probe import Probed, Skipped, probe
from shared.sources.rows import read_sources
from tests.corpus import config_for, write_corpus


@pytest.fixture
def stage(pipeline: Path, tmp_path: Path) -> Stage:
    root = write_corpus(tmp_path / "clips", 12)
    return open_stage(config_for(pipeline, root, tmp_path / "cache"), Part())


class Prober:
    """Gives long probes of short files, one after the other as the pool does."""

    def __init__(self, outcomes: dict[str, Skipped] | None = None) -> None:
        self.outcomes = outcomes or {}

    def probe_all(self, paths: Sequence[Path]) -> Iterator[Probed | Skipped]:
        for path in paths:
            times = array("q", range(0, 8_000 * 125, 125))
            found = probe(path)
            yield self.outcomes.get(path.name) or Probed(replace(found.probe, num_frames=len(times)), times)


def test_time_stamps_are_dropped_once_windows_are_cut(stage: Stage) -> None:
    prober: Any = Prober()
    sources = read_sources(stage.config.data).sources
    cut_clips(stage, sources[:1], prober, "r")  # imports
    tracemalloc.start()
    try:
        clips, _ = cut_clips(stage, sources, prober, "r")
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(clips) == 12
    assert kept < 12 * 4096, "12 files have 0.8 MB of time stamps"


def test_clips_come_in_the_order_of_their_sources(stage: Stage) -> None:
    root = stage.config.data.instance_data_root
    (root / "001.mp4").rename(root / "take 1.ogv")
    names = ["003.mp4", "take 1.ogv", "003.mp4", "000.mp4", "002.mp4", "take 1.ogv"]
    (root / "videos.txt").write_text("\n".join(names), "utf-8")
    (root / "prompts.txt").write_text("\n".join("abcdef"), "utf-8")
    prober: Any = Prober(
        {"take 1.ogv": Skipped("bad: ffmpeg -i VIDEO NEW.mp4"), "000.mp4": Skipped("gone", permanent=False)}
    )
    clips, left_out = cut_clips(stage, read_sources(stage.config.data).sources, prober, "r")
    assert [(clip.source.name, clip.source.captions[0].text) for clip in clips] == [
        ("003.mp4", "a"),
        ("003.mp4", "c"),
        ("002.mp4", "e"),
    ]
    assert [(source.captions[0].text, skipped) for source, skipped in left_out] == [
        ("b", Skipped("bad: ffmpeg -i 'take 1.ogv' 'take 1.mp4'")),
        ("d", Skipped("gone", permanent=False)),
        ("f", Skipped("bad: ffmpeg -i 'take 1.ogv' 'take 1.mp4'")),
    ]

"""Links to outside that are put into the data root between a file's check and its opening, or at any moment."""

import random
import shutil
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.config import Data
from shared.errors import PrecogError
from shared.media.probe import VideoError, probe
from shared.sources.rows import read_sources
from tests import media

CANARY = "canary"
KINDS = ("a.txt", "a.mp4", "prompts.txt", "videos.txt", "metadata.csv", "metadata.jsonl", "metadata.parquet", "a.tar")
_hook: Callable[[str], None] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _hook is not None and event == "open" and isinstance(arguments[0], str | Path):
        _hook(str(arguments[0]))


sys.addaudithook(_audit)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    return {word: media.write_clip(folder / f"{word}.mp4", frames=n) for n, word in ((2, "inside"), (3, CANARY))}


def write(folder: Path, kind: str, word: str, videos: dict[str, Path]) -> None:
    """Write a data root of one kind; its captions are `word`, its video has 3 frames for the canary."""
    folder.mkdir(parents=True)
    shutil.copy(videos[word], folder / "a.mp4")
    shutil.copy(videos[word], folder / f"{word}.mp4")
    texts = {
        "a.txt": word,
        "prompts.txt": word,
        "videos.txt": f"{word}.mp4" if kind == "videos.txt" else "a.mp4",
        "metadata.csv": f"video,text\na.mp4,{word}\n",
        "metadata.jsonl": f'{{"video": "a.mp4", "text": "{word}"}}\n',
    }
    partner = {"a.mp4": "a.txt", "prompts.txt": "videos.txt", "videos.txt": "prompts.txt", "a.tar": "a.txt"}
    for name in {kind, partner.get(kind, kind)} & texts.keys():
        (folder / name).write_text(texts[name])
    if kind == "metadata.parquet":
        pq.write_table(pa.table({"video": ["a.mp4"], "text": [word]}), folder / kind)
    if kind == "a.tar":
        with tarfile.open(folder / kind, "w") as tar:
            for name in ("a.mp4", "a.txt"):
                tar.add(folder / name, name)
                (folder / name).unlink()
    if kind != "videos.txt":
        (folder / f"{word}.mp4").unlink()


def swap(inside: Path, outside: Path) -> None:
    """Put a link to `outside` in the place of a file or folder."""
    inside.rename(inside.with_name(f".{inside.name}.old"))
    inside.symlink_to(outside)


def outcome(root: Path) -> str:
    """Return all that reading and probing give, or the project's error."""
    try:
        found = read_sources(Data(name="test", instance_data_root=root))
        frames = [probe(source.path).probe.num_frames for source in found.sources if not source.skipped]
    except (PrecogError, VideoError) as error:
        return f"error: {error}"
    canary = CANARY if 3 in frames else ""
    return canary + repr([(source.captions, source.name) for source in found.sources if not source.skipped])


@pytest.fixture(autouse=True)
def linked_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_embedded_videos_are_read_with_a_linked_cache_folder(tmp_path: Path, videos: dict[str, Path]) -> None:
    write(tmp_path / "root", "a.tar", "inside", videos)
    assert "text='inside'" in outcome(tmp_path / "root")


def test_a_tar_that_is_a_link_to_outside_is_refused(tmp_path: Path, videos: dict[str, Path]) -> None:
    write(tmp_path / "outside", "a.tar", CANARY, videos)
    (tmp_path / "root").mkdir()
    (tmp_path / "root/a.tar").symlink_to(tmp_path / "outside/a.tar")
    assert "path 'a.tar' is a link that leaves the data root" in outcome(tmp_path / "root")


@pytest.mark.parametrize("parent", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_link_put_in_before_any_open_is_not_followed(
    tmp_path: Path, kind: str, parent: bool, videos: dict[str, Path]
) -> None:
    global _hook
    for at in range(1, 9):
        root, outside, opens = tmp_path / f"{at}/root", tmp_path / f"{at}/outside", 0
        write(root, kind, "inside", videos)
        write(outside, kind, CANARY, videos)
        target = (root, outside) if parent else (root / kind, outside / kind)

        def swap_at(path: str, root: Path = root, target: tuple[Path, Path] = target, at: int = at) -> None:
            nonlocal opens
            opens += path.startswith(f"{root}/")
            if opens == at and not target[0].is_symlink():
                swap(*target)

        _hook = swap_at
        try:
            found = outcome(root)
        finally:
            _hook = None
        assert CANARY not in found
        if opens < at:
            break
    assert opens < at and at > 1


def _race(base: Path, draw: random.Random, videos: dict[str, Path]) -> str:
    kind, folder = draw.choice(KINDS), draw.random() < 0.3
    below = "sub" if folder and kind in ("a.txt", "a.mp4") else ""
    write(base / "root" / below, kind, "inside", videos)
    write(base / "outside" / below, kind, CANARY, videos)
    name, moment = below or kind, draw.uniform(0, 0.01)
    thread = threading.Timer(moment, swap, (base / "root" / name, base / "outside" / name))
    thread.start()
    try:
        return outcome(base / "root")
    finally:
        thread.join()


@pytest.mark.parametrize("tries", [10, pytest.param(300, marks=pytest.mark.faults)])
def test_links_put_in_at_random_moments_are_not_followed(tmp_path: Path, tries: int, videos: dict[str, Path]) -> None:
    draw = random.Random(7)
    found = [_race(tmp_path / str(number), draw, videos) for number in range(tries)]
    assert [text for text in found if CANARY in text] == []
    assert any("link was put" in text for text in found) or tries < 300, "the races must hit"

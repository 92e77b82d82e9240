"""Many cheap, different clips and the config that reads them, for tests of stage 1."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from precompute.assignments import Part
from precompute.report import Report
from precompute.run import precompute
from shared.atomic_files import TEMPORARY
from shared.cache.index import INDEX
from shared.cache.storage import LocalStorage
from shared.config import Config

FRAMES, SIDE = 5, 32


def write_video(path: Path, seed: int) -> Path:
    """Five frames of 32x32 that no other seed gives, a few hundred bytes."""
    draws = np.random.default_rng(seed)
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for _ in range(FRAMES):
            blocks = draws.integers(0, 256, (2, 2, 3), np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(blocks.repeat(16, 0).repeat(16, 1), format="rgb24")))
        out.mux(stream.encode(None))
    return path


def write_corpus(folder: Path, count: int) -> Path:
    """`count` clips with a caption each, as prompts.txt and videos.txt."""
    folder.mkdir(parents=True)
    for number in range(count):
        write_video(folder / f"{number:03}.mp4", number)
    write_captions(folder, [f"clip number {number}" for number in range(count)])
    return folder


def write_captions(folder: Path, captions: Sequence[str]) -> None:
    """One caption per video, in the order of their names."""
    names = sorted(path.name for path in folder.glob("*.mp4"))
    (folder / "prompts.txt").write_text("\n".join(captions), "utf-8")
    (folder / "videos.txt").write_text("\n".join(names), "utf-8")


def config_for(
    pipeline: Path, root: Path, cache: Path | str, *, data: dict[str, Any] | None = None, **settings: Any
) -> Config:
    """Clips of 5x16x32; `data` and `settings` go over the [data] and [precompute] tables."""
    return Config.model_validate(
        {
            "model": {"pretrained_model_name_or_path": str(pipeline)},
            "data": {
                "name": "corpus",
                "instance_data_root": root,
                "caption_column": "prompts.txt",
                "video_column": "videos.txt",
                "fps": 0,
                "frame_buckets": [5],
                "allow_uneven_frame_buckets": True,
                "resolution_buckets": [[16, 32]],
                "validation_prompts": ["a rabbit"],
                **(data or {}),
            },
            "precompute": {
                "cache": str(cache),
                "device": "cpu",
                "decode_workers": 1,
                "clips_per_shard": 4,
                "vae_batch_size": 2,
                **settings,
            },
            "train": {"output_dir": "runs/corpus"},
        }
    )


def run(config: Config, part: Part = Part()) -> Report:  # noqa: B008
    """Run stage 1 in this process."""
    return precompute(config, part)


def stored_files(cache: Path) -> dict[str, bytes]:
    """Return the files that must be the same in every cache: shards, receipts, recipes, views."""
    return {
        path.relative_to(cache).as_posix(): path.read_bytes()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and not path.name.startswith((TEMPORARY, INDEX))
        if path.relative_to(cache).parts[0] in ("latents", "prompts", "datasets")
    }


def count_storage_calls(patch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """Count the calls of `LocalStorage` that look at files from now on, by method and by file or folder."""
    calls: Counter[tuple[str, str]] = Counter()

    def counted(method: str) -> Callable[..., Any]:
        original = getattr(LocalStorage, method)

        def call(storage: LocalStorage, name: str, *arguments: Any, **named: Any) -> Any:
            calls[method, name] += 1
            return original(storage, name, *arguments, **named)

        return call

    for method in ("files", "read", "read_part", "size", "local_tar"):
        patch.setattr(LocalStorage, method, counted(method))
    return calls

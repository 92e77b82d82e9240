"""Folders of raw videos and projects over them, for tests of `prepare`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from precog import app
from tests.media import write_clip

Row = dict[str, Any]


def precog(*arguments: str | Path) -> Result:
    """Run one command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def report_of(result: Result) -> dict[str, Any]:
    """Return the object of `--json`; fails with the command's messages if there is none."""
    assert result.stdout, result.stderr
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def write_video(path: Path, *, height: int = 256, width: int = 384, frames: int = 12, **options: Any) -> Path:
    """Write a bar-coded video at 8 fps that fits the 480x720 bucket without being enlarged more than twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_clip(path, height=height, width=width, frames=frames, rate=8, codec="mpeg4", bframes=0, **options)


def rows_of(table: Path) -> list[Row]:
    """Return the rows of a JSONL table."""
    return [json.loads(line) for line in table.read_text("utf-8").splitlines()]


def write_table(table: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSONL."""
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def write_project(folder: Path, names: Sequence[str], *, id_token: str = "") -> Path:
    """Write a config and a table of small different clips without captions; returns the config."""
    (folder / "videos").mkdir()
    for number, name in enumerate(names):
        write_clip(folder / "videos" / name, frames=4 + number, rate=8, codec="mpeg4", bframes=0)
    write_table(folder / "dog.jsonl", [{"video": name, "text": ""} for name in names])
    config = f"""
        [model]
        pretrained_model_name_or_path = "no/model-here"
        [data]
        name = "dog"
        instance_data_root = {json.dumps(str(folder / "videos"))}
        dataset_name = {json.dumps(str(folder / "dog.jsonl"))}
        id_token = {json.dumps(id_token)}
        [precompute]
        cache = "cache"
        [train]
        output_dir = "run"
    """
    (folder / "dog.toml").write_text(config, "utf-8")
    return folder / "dog.toml"

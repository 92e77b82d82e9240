"""The README word by word: every command in it is run, in order, in a copy of the project."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LEFT_TO_CI = {"make test", "make lint"}
"""Commands that would run this test from within itself."""


def commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    return [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git tracks, with this environment linked in."""
    folder = tmp_path_factory.mktemp("checkout")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


def run_all(chosen: list[str], checkout: Path) -> None:
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "ARGS"))}
    for command in chosen:
        result = subprocess.run(shlex.split(command), cwd=checkout, env=outside, capture_output=True, text=True)
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
        if command == "make precompute CONFIG=configs/demo.toml":
            assert "Nothing to encode: everything is stored already." in result.stderr


def test_every_make_command_of_the_readme_runs(checkout: Path) -> None:
    chosen = [command for command in commands() if command.startswith("make ") and command not in LEFT_TO_CI]
    assert chosen[0] == "make demo"
    run_all(chosen, checkout)
    for name in ("export/pytorch_lora_weights.safetensors", "metrics.jsonl", "config.toml", "checkpoint-000060"):
        assert (checkout / "runs" / "demo" / name).exists(), name
    assert list((checkout / "runs" / "demo" / "samples").glob("*-lora.mp4"))


@pytest.mark.faults  # ten processes, a minute and a half
def test_every_other_command_of_the_readme_runs(checkout: Path) -> None:
    chosen = [command for command in commands() if not command.startswith("make ")]
    assert any("sweep" in command for command in chosen)
    run_all(["make precompute", *chosen], checkout)


def test_the_readme_names_files_and_fields_that_exist() -> None:
    from shared.config import Config

    for table, field in re.findall(r"`(model|data|precompute|train|memory|sample)\.([a-z_]+)[=`]", README):
        annotation = Config.model_fields[table].annotation
        assert annotation is not None
        assert field in annotation.model_fields, f"{table}.{field}"
    for name in re.findall(r"`((?:configs|demo|bench|tests)/[\w./-]*)`", README):
        assert (ROOT / name).exists(), name

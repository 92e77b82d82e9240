"""The pages are true: every command in README and docs is run in order, and every field and file in them exists."""

import gc
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from precog import app
from shared.config import Config
from tests.media import write_clip

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICK = ("config", "plan", "precompute", "cache")
"""Commands that take a second or two on the demo; the others run with the marker `faults`."""
SLOW = {"--card", "--part", "configs/demo-real.toml", "data.dataset_name=demo/clips/metadata.csv"}
PRECOMPUTE = [".venv/bin/precog", "precompute", "configs/demo.toml"]


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Return the arguments of every command of a page."""
    return [shlex.split(line, comments=True) for block in blocks(page, "sh") for line in block.splitlines() if line]


def is_quick(command: list[str]) -> bool:
    """Return whether a command runs in every test run; others, such as the simulation of a card, take longer."""
    return command[0] == "make" or (command[0] == ".venv/bin/precog" and command[1] in QUICK and not SLOW & {*command})


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the files that commands read to an empty folder, with this environment linked in."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "demo"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


def run(command: list[str], checkout: Path) -> str:
    """Run a command of a page; return what it prints for people. A target of make is only resolved."""
    if command[0] == "make":
        command = [command[0], "--dry-run", *command[1:]]
    elif is_quick(command):  # in this process, because to import the libraries takes longer than the command
        found = CliRunner().invoke(app, command[1:])
        assert found.exit_code == 0, f"{command}\n{found.stderr}"
        return found.stderr
    else:
        module = {".venv/bin/precog": "precog", ".venv/bin/torchrun": "torch.distributed.run"}[command[0]]
        command = [sys.executable, "-m", module, *command[1:]]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stderr


@pytest.mark.timeout(300)
def test_quick_commands_of_every_page_run(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    for command in dict.fromkeys(tuple(command) for page in PAGES for command in commands(page)):
        if is_quick(list(command)):
            run(list(command), checkout)
    assert "Nothing was encoded: everything is stored already." in run(PRECOMPUTE, checkout)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_subcommands_that_exist(page: Path) -> None:
    known = set(getattr(get_command(app), "commands"))  # noqa: B009
    names = re.findall(r"\bprecog ([a-z]+)", page.read_text("utf-8").partition("Removed, and")[0])
    assert set(names) <= known, names


@pytest.mark.parametrize("page", ["4090", "preparing"])
def test_a_command_of_a_page_has_the_arguments_it_is_shown_with(page: str) -> None:
    for line in re.findall(r"^precog .*", (ROOT / "docs" / f"{page}.md").read_text("utf-8"), re.MULTILINE):
        _, name, *arguments = shlex.split(line, comments=True)
        context = get_command(app).make_context("precog", [name, *arguments])
        context.command.get_command(context, name).make_context(name, arguments)  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its file open
def test_the_cache_page_reads_the_cache(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(checkout)
    run(PRECOMPUTE, checkout)
    shapes = []
    for number, example in enumerate(blocks(ROOT / "docs" / "cache.md", "python")):
        (checkout / f"example{number}.py").write_text(example, "utf-8")
        capsys.readouterr()
        runpy.run_path(str(checkout / f"example{number}.py"))
        shapes.append(re.findall(r"\(\d[\d, ]*\)", capsys.readouterr().out))
    gc.collect()
    stored, view = shapes
    demo = [shape for shape in stored if re.fullmatch(r"\(16, [35], 8, (8|12)\)", shape)]
    assert len(demo) >= 40, "those of the other demo are there too if another test encoded them"
    assert len(view) == 72 and set(view[1::2]) == {"(16, 64)"}, view


@pytest.mark.faults  # a dozen processes
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_runs(page: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    for command in commands(page):
        run(command, checkout)
    if page.name == "README.md":
        for name in ("export/pytorch_lora_weights.safetensors", "metrics.jsonl", "config.toml", "checkpoint-000400"):
            assert (checkout / "runs" / "demo" / name).exists(), name
        assert list((checkout / "runs" / "demo" / "samples").glob("*-lora.mp4"))


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_fields_files_and_targets_of_a_page_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    for table, field in re.findall(r"\b(model|data|precompute|train|memory|sample)\.([a-z_]+)(?=[`=\s])", text):
        annotation = Config.model_fields[table].annotation
        assert annotation is not None and (field in ("toml", "py", "json") or field in annotation.model_fields), (
            table,
            field,
        )
    for name in re.findall(r"[`(]((?:configs|demo|bench|tests|docs|shared|train|precompute)/[\w./-]*)[`)]", text):
        assert (ROOT / name).exists(), name
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets | {"help"}


def test_the_readme_is_short_and_its_lines_fit() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 200


@pytest.mark.faults  # a dozen processes
def test_the_4090_page_leads_from_a_folder_to_a_lora(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every command of the page; after `init`, dog.toml is a short run of the demo under the page's names."""
    monkeypatch.chdir(checkout)
    videos = checkout / "dogvideos"
    videos.mkdir()
    write_clip(videos / "a.mp4", frames=60, height=480, width=720)
    lines = [line for block in blocks(ROOT / "docs" / "4090.md", "") for line in block.splitlines()]
    names = "init precompute plan train train report sample export push"
    assert " ".join(line.split()[1] for line in lines) == names
    for line in lines:
        command = shlex.split(line.replace("~/dogvideos", str(videos)))
        run([".venv/bin/precog", *command[1:]], checkout)
        if command[1] == "init":
            assert (checkout / "dog.jsonl").exists() and "zai-org/CogVideoX-5b" in (checkout / "dog.toml").read_text()
            demo = (checkout / "configs" / "demo.toml").read_text("utf-8").replace("runs/demo", "runs/dog")
            demo = demo.replace("max_train_steps = 400", "max_train_steps = 4").replace("checkpointing_steps = 200", "")
            demo = re.sub(r"^prompts = .*", 'prompts = ["a zorp on snow"]', demo, flags=re.MULTILINE)
            (checkout / "dog.toml").write_text(demo, "utf-8")
    assert (checkout / "exported" / "dog.safetensors").exists()
    assert list((checkout / "runs" / "dog" / "hub").glob("samples/*.mp4"))
    assert (checkout / "runs" / "dog" / "report.html").exists()

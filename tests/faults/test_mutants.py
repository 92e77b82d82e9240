"""Mutants of safety mechanisms: a single change to a copy of the packages turns the test that is named for it red.

A mutant in mutants.txt is `PROTECTS: TEST`, the lines of its file that are taken out, each after "-", and those put in
their place, after "+". `(hangs)` says that the test runs into its deadline, `(unseen: REASON)` that no test can be red.
Each trial is a fork of a process that has the libraries loaded, but none of our modules.
"""

import multiprocessing
import os
import re
import runpy
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
COPIED = ("bench", "configs", "precompute", "prepare", "report", "sample", "shared", "tests", "train")
LIBRARIES = ["accelerate", "av", "diffusers", "peft", "pyarrow.parquet", "pydantic", "transformers", "webdataset"]
LIBRARIES += ["diffusers.pipelines.cogvideo.pipeline_cogvideox", "transformers.models.t5.modeling_t5", "torch._dynamo"]
HANG_SECONDS, DEADLINE_SECONDS = 40, 300
SCRIPT = """
import os, sys
os.setsid()
os.chdir(copy)
sys.path[:] = [copy, *(path for path in sys.path if path not in ("", root))]
os.environ["PYTHONPATH"], sys.dont_write_bytecode = copy, True
output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(output, 1)
os.dup2(output, 2)
import pytest
sys.exit(int(pytest.main(arguments)))
"""


class Mutant(NamedTuple):
    """One change to a file of the packages."""

    file: str
    protects: str
    mark: str
    """"hangs", "unseen: REASON", or nothing."""
    test: str
    """Node below tests/ that turns red."""
    old: str
    """A text that the file has once."""
    new: str


def read_mutants() -> Iterator[Mutant]:
    """Yield the mutants of mutants.txt."""
    for part in re.split(r"^# ", (ROOT / "tests/faults/mutants.txt").read_text("utf-8"), flags=re.MULTILINE)[1:]:
        file, _, text = part.partition("\n")
        for entry in re.findall(r"^[^-+\n].*\n(?:-.*\n)+(?:\+.*\n)*", text, re.MULTILINE):
            head, *lines = entry.splitlines()
            found = re.fullmatch(r"(.+?)(?: \((hangs|unseen: .+)\))?: (\S+)", head)
            assert found is not None, head
            protects, mark, test = found.groups("")
            old, new = ("\n".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
            yield Mutant(file, protects, mark, test, old, new)


MUTANTS = list(read_mutants())


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a copy of the packages and their tests."""
    folder = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("precog.py", "pyproject.toml"):
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "demo").symlink_to(ROOT / "demo")
    (folder / "run.py").write_text(SCRIPT, "utf-8")
    return folder


def end_of(copy: Path, *tests: str) -> tuple[int | str | None, str]:
    """Run tests in a fork; return the exit code of pytest, "hangs" if a deadline ended it, and its output."""
    arguments = ["-q", "-x", "-n0", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    arguments += [f"--timeout={HANG_SECONDS}", *(f"tests/{test}" for test in tests)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    given = {"copy": str(copy), "root": str(ROOT), "arguments": arguments}
    child = context.Process(target=runpy.run_path, args=(str(copy / "run.py"), given))
    child.start()
    child.join(DEADLINE_SECONDS)
    hangs = child.is_alive()
    if hangs and child.pid is not None:
        os.killpg(child.pid, signal.SIGKILL)
        child.join()
    output = (copy / "output.txt").read_text("utf-8", "replace")
    return "hangs" if hangs or "Timeout (>" in output else child.exitcode, output


def test_every_mutant_applies_to_the_code() -> None:
    counts = {mutant[:2]: (ROOT / mutant.file).read_text("utf-8").count(mutant.old) for mutant in MUTANTS}
    assert set(counts.values()) == {1}, [mutant for mutant, count in counts.items() if count != 1]


@pytest.mark.faults
def test_named_tests_pass_without_a_change(copy: Path) -> None:
    code, output = end_of(copy, *dict.fromkeys(mutant.test for mutant in MUTANTS))
    assert code == 0, output
    assert sum(not mutant.mark.startswith("unseen") for mutant in MUTANTS) >= 60


@pytest.mark.faults
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.protects}")
def test_mutant_turns_its_test_red(copy: Path, mutant: Mutant) -> None:
    path = copy / mutant.file
    text = path.read_text("utf-8")
    path.write_text(text.replace(mutant.old, mutant.new), "utf-8")
    try:
        code, output = end_of(copy, mutant.test)
    finally:
        path.write_text(text, "utf-8")
    assert code == ("hangs" if mutant.mark == "hangs" else 0 if mutant.mark else 1), output

"""The house rules that a machine can hold: who may import whom, what is never called, how light the command is."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("prepare", "precompute", "train", "sample", "shared")
MAY_IMPORT = {
    "shared": {"shared"},
    "prepare": {"prepare", "shared"},
    "precompute": {"precompute", "shared"},
    "train": {"train", "shared"},
    "sample": {"sample", "shared"},
}
FORBIDDEN_IMPORTS = {"pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "torch.save", "yaml.load", "os.system", "extractall", "extract"}
FORBIDDEN_KEYWORDS = {"shell": True, "trust_remote_code": True, "allow_pickle": True}


def sources() -> list[Path]:
    folders = [*PACKAGES, "demo", "bench"]
    return [ROOT / "precog.py", *(path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))]


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        rooms = {module.split(".")[0] for module in imported_modules(path)} & set(PACKAGES)
        assert rooms <= MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {rooms - MAY_IMPORT[package]}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles_evaluates_or_extracts(path: Path) -> None:
    assert not {module.split(".")[0] for module in imported_modules(path)} & FORBIDDEN_IMPORTS
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in FORBIDDEN_CALLS, f"{path}:{node.lineno}: {name}"
            assert name.rpartition(".")[2] not in {"extractall"}, f"{path}:{node.lineno}: {name}"
            for keyword in node.keywords:
                if keyword.arg in FORBIDDEN_KEYWORDS and isinstance(keyword.value, ast.Constant):
                    assert keyword.value.value != FORBIDDEN_KEYWORDS[keyword.arg], f"{path}:{node.lineno}: {name}"


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, precog; print([m for m in ('torch', 'diffusers', 'pydantic', 'numpy') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert loaded.strip() == "[]"


def test_library_code_logs_and_never_prints() -> None:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            calls = [
                node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
            ]
            printing = [node.lineno for node in calls if ast.unparse(node.func) == "print"]
            assert not printing or path.name.endswith("cli.py"), f"{path}: prints in lines {printing}"

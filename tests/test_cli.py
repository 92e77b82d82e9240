"""The command line: wrong input is one clear line with the right exit code."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from precog import __version__, app
from shared.command import exits
from shared.config_file import load_config

ROOT = Path(__file__).parent.parent
CONFIG = str(ROOT / "configs" / "demo-real.toml")


@pytest.fixture
def precog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(ROOT)

    def run(command: str, *overrides: str) -> Result:
        places = (f"precompute.cache={tmp_path}/cache", f"train.output_dir={tmp_path}/run")
        return CliRunner().invoke(app, [command, CONFIG, *places, *overrides])

    return run


def problem(result: Result) -> str:
    """Return the only line on standard error about the fault."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("precog: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def test_a_wrong_key_is_refused_before_torch_is_imported() -> None:
    code = (
        "import sys; from precog import app; from typer.testing import CliRunner\n"
        "for command in ('precompute', 'train', 'sample', 'decode', 'plan', 'config', 'sweep --grid train.seed=1'):\n"
        f"    found = CliRunner().invoke(app, [*command.split(), {CONFIG!r}, 'train.lora_rnk=8'])\n"
        "    assert found.exit_code == 2 and 'did you mean train.lora_rank' in found.stderr, found.stderr\n"
        "    assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules), command\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_version_and_the_resolved_config_are_printed(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"precog {__version__}\n"
    result = CliRunner().invoke(app, ["config", CONFIG, "train.lora_rank=5"])
    (tmp_path / "config.toml").write_text(result.stdout, "utf-8")
    assert load_config(tmp_path / "config.toml") == load_config(Path(CONFIG), ["train.lora_rank=5"])


def test_the_command_completes_itself() -> None:
    environment = {"_PRECOG_COMPLETE": "complete_bash", "COMP_WORDS": "precog pre", "COMP_CWORD": "1"}
    assert "precompute" in CliRunner().invoke(app, [], prog_name="precog", env=environment).stdout


@pytest.mark.parametrize(
    ("command", "override", "code", "words"),
    [
        ("train", "train.lora_rank=-1", 2, ["train.lora_rank = -1", "greater than 0"]),
        ("precompute", "--part=4/3", 2, ["4/3"]),
        ("precompute", "model.pretrained_model_name_or_path=demo", 2, ["demo", "vae/ not found"]),
        ("train", "data.validation_prompts=5", 2, ["a list such as", "quoted for the shell"]),
        ("train", "data.name=other", 4, ["datasets/other", "view not found", "precog precompute"]),
        ("sample", 'sample.loras=[{path="no-such-file"}]', 2, ["no-such-file", "adapter not found"]),
        ("sample", "sample.prompts=[]", 2, ["sample.prompts: must not be empty"]),
    ],
)
def test_a_wrong_value_is_one_line(
    precog: Callable[..., Result], command: str, override: str, code: int, words: list[str]
) -> None:
    result = precog(command, override)
    assert result.exit_code == code, result.stderr
    assert all(word in problem(result) for word in words), problem(result)


def test_an_error_of_the_file_system_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @exits
    def command() -> None:
        tmp_path.read_bytes()

    with pytest.raises(SystemExit) as end:
        command()
    assert (end.value.code, capsys.readouterr().err) == (1, f"precog: {tmp_path}: Is a directory\n")

"""The commands of docs/preparing.md have the arguments that they are shown with."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from precog import app

PAGE = (Path(__file__).parents[2] / "docs" / "preparing.md").read_text("utf-8")
BLOCKS = re.findall(r"```\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("precog ")]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_page_is_understood(line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    context = get_command(app).make_context("precog", [name, *arguments])
    command = context.command.get_command(context, name)  # type: ignore[attr-defined]
    command.make_context(name, arguments)


def test_the_page_shows_every_command() -> None:
    assert {line.split()[1] for line in COMMANDS} == {"init", "split", "caption", "precompute"}

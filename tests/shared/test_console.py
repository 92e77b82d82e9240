"""Output for people without a terminal."""

import re

import pytest
from pydantic import BaseModel

from shared.console import Progress, bytes_text, say, show_config, table


class Inner(BaseModel):
    size: int
    names: tuple[str, ...] = ("a",)
    rate: float | None = None


class Outer(BaseModel):
    first: Inner
    second: Inner = Inner(size=1)


def test_progress_is_a_line_every_ten_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Progress("probing", 4) as bar:
        bar.advance()
        assert Progress.LINE_SECONDS == 10 and capsys.readouterr().err == ""
    monkeypatch.setattr(Progress, "LINE_SECONDS", 0.0)
    with Progress("probing", 4) as bar:
        bar.advance(3)
    assert re.fullmatch(r"probing: 3/4, [\d.]+/s, \d+ s left\n", capsys.readouterr().err)


def test_only_fields_off_their_defaults_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    show_config(Outer(first=Inner(size=3, names=("b", "c"), rate=0.5)))
    assert capsys.readouterr().err == '[first] size=3 names=["b", "c"] rate=0.5\n[second] size=1\n'
    show_config(Outer(first=Inner(size=3, names=("a",))))
    assert capsys.readouterr().err == "[first] size=3\n[second] size=1\n"


def test_long_lines_and_markup_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    line = "[red]" + 40 * "long " + "[/red]"
    say(line)
    table(line, [("a", line), ("long name", 1)])
    assert capsys.readouterr().err == f"{line}\n{line}\n  a          {line}\n  long name  1\n"


def test_only_rank_0_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    say("line")
    table("title", [("a", 1)])
    assert capsys.readouterr().err == ""


def test_sizes_have_binary_units() -> None:
    assert [bytes_text(size) for size in (0, 1023, 1536, 2**40)] == ["0 B", "1023 B", "1.5 KiB", "1.0 TiB"]

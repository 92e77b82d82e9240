"""What people see where there is no terminal."""

import re

import pytest

from shared.console import Progress


def test_progress_without_a_terminal_is_a_line_with_count_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Progress, "LINE_SECONDS", 0.0)
    with Progress("probing", 4) as bar:
        bar.advance(3)
    assert re.fullmatch(r"probing: 3/4, [\d.]+/s, \d+ s left\n", capsys.readouterr().err)

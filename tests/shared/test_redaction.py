"""Secrets on the command line and in a table: refused or shown as ***, never repeated."""

from pathlib import Path

import pytest

from precog import main
from shared.command import exits
from shared.errors import UsageError
from shared.redaction import HAS_SECRET, redacted
from shared.sources.tables import escaped

CANARY = "CANARY1f0e"
URLS = [
    f"s3://ID:{CANARY}@bucket/cache",
    f"s3://ID:a@{CANARY}/b@bucket",
    f"ftp://user:{CANARY}@host/cache",
    f"https://{CANARY}@host/cache",
    f"https://host/cache?token={CANARY}",
    f"hf://datasets/hf_{CANARY}{'0' * 20}/name",
]
COMMANDS = [
    "cache ls URL",
    "cache push here URL",
    "push here URL",
    "ls URL",
    "train a.toml data.name=URL",
    "init --x=URL",
]


@pytest.mark.parametrize("url", URLS)
def test_a_secret_within_an_argument_is_in_no_output(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in COMMANDS:
        monkeypatch.setattr("sys.argv", ["precog", *command.replace("URL", url).split()])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = "".join(capsys.readouterr())
        assert ended.value.code == 2 and "***" in shown and HAS_SECRET in shown and CANARY not in shown, command


def test_a_secret_within_a_message_is_redacted(capsys: pytest.CaptureFixture[str]) -> None:
    @exits
    def fails() -> None:
        raise UsageError(f"no answer from {URLS[0]}")

    with pytest.raises(SystemExit):
        fails()
    assert "s3://***@bucket/cache" in capsys.readouterr().err


def test_only_secrets_are_redacted() -> None:
    for plain in (
        "s3://bucket/cache@2",
        "http://localhost:8000/v1/a@b",
        "someone/zorp",
        "0.mp4: not found",
        "clips/a@b:c.mp4",
        "hf://datasets/user/name@" + "0a" * 20,
    ):
        assert redacted(plain) == plain
    assert escaped(f"https://u:{CANARY}@host/a.mp4") == "https://***@host/a.mp4"
    assert redacted(str(Path(f"s3://u:{CANARY}@b/c"))) == "s3:/***@b/c"

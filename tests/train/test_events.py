"""Everything that a training command leaves for people and programs: log, events, page, JSON, tracker."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.utils import LoggerType
from PIL import Image
from typer.testing import CliRunner

import precog
from report.filmstrips import write_held_out
from shared.config import Config
from shared.config_file import save_config
from shared.errors import Preempted
from shared.run_folder import EVENTS, LOG, read_events, read_metrics
from shared.signals import StopSignal
from tests.experiments import changed
from train.events import PageProcess, recorded
from train.loop import train

Settings = Callable[..., Config]
TRACKIO = """
import json
config = {}
class Run:
    def log(self, values, step=None, **more):
        with open("tracked.jsonl", "a") as file:
            file.write(json.dumps([step, values]) + "\\n")
    def finish(self):
        pass
def init(project, name, resume, **more):
    assert (project, name, resume) == ("precog", "run", "allow")
    return Run()
"""
"""Stands in for trackio, of which accelerate's tracker calls this much."""


def test_a_training_command_leaves_log_events_json_and_tracker(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(max_train_steps=8, validation_steps=4, report_to="trackio", log_steps=3)
    save_config(config, tmp_path / "config.toml")
    (tmp_path / "trackio-0.40.dist-info").mkdir()
    (tmp_path / "trackio-0.40.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: trackio\nVersion: 0.40\n"
    )
    (tmp_path / "trackio.py").write_text(TRACKIO)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TRACKIO])  # found at its import
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(precog.app, ["train", "config.toml", "--json"])
    assert done.exit_code == 0, done.stderr
    run = config.train.output_dir
    lines = read_metrics(run)
    found = json.loads(done.stdout)
    assert found["held_out_loss"] == lines[-1]["held_out_loss"] and found["steps"] == 8
    assert Path(found["adapter"]).exists() and found["page"] is None, "a short run has no page"
    assert [line.split()[0] for line in done.stderr.splitlines() if "/8" in line] == ["3/8", "6/8"]
    said = [line[20:] for line in (run / LOG).read_text().splitlines()]
    assert [line for line in said if len(line) >= 80 and str(run) not in line] == []
    assert "\n".join(said) in done.stderr
    assert [(event["event"], event["step"]) for event in read_events(run)] == [("started", 0), ("finished", 8)]
    assert write_held_out(run / "held-out", run, lines[3]["held_out_clips"])
    with Image.open(run / "held-out" / "strips-000.webp") as strips:
        assert strips.size == (6 * 96, 64)
    tracked = [json.loads(line) for line in (tmp_path / "tracked.jsonl").read_text().splitlines()]
    assert [step for step, values in tracked if "lr" in values] == list(range(1, 9))
    assert tracked[-1][1]["held_out_loss"] == found["held_out_loss"]


def test_a_stop_and_a_resume_are_events(settings: Settings) -> None:
    config = settings(max_train_steps=2, checkpointing_steps=1)
    train(changed(config, train={"max_train_steps": 1}), StopSignal())
    stop = StopSignal()
    stop.requested = True
    with pytest.raises(Preempted):
        train(config, stop)
    train(config, StopSignal())
    run = config.train.output_dir
    events = [event["event"] for event in read_events(run)]
    assert events == ["started", "finished", "resumed", "stopped", "resumed", "finished"]
    assert "ended by Preempted: stopped by a signal: checkpoint saved at step 1" in (run / LOG).read_text()
    with (run / EVENTS).open("a") as file:
        file.write('{"torn')
    assert len(read_events(run)) == 6


def test_a_page_that_fails_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PageProcess(tmp_path / "no run").write_last()
    line = "report.html: not written; `precog report run"
    assert line in capsys.readouterr().err.replace("\n", " ")


def test_pages_while_training_take_one_percent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, program, clock = tmp_path / "log", tmp_path / "python", [0.0]
    program.write_text(f"#!/bin/sh\necho >> {log}\nfor i in $(seq 200000); do :; done\necho >> {log}\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr("train.events.PAGE_CPU_SECONDS", 0.01)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    page = PageProcess(tmp_path)

    def lines_at(run_seconds: float, expected: int) -> int:
        """Ask for pages until the log has the expected lines, two of each page, and a little longer."""
        clock[0], last = run_seconds, time.time() + 30
        while time.time() < last:
            page.start_if_cheap()
            found = log.read_bytes().count(b"\n") if log.exists() else 0
            if found >= expected:
                last = min(last, time.time() + 0.2)
            time.sleep(0.01)
        return found

    assert lines_at(0.9, 0) == 0, "1 % of the time is less than a page"
    assert lines_at(1.1, 2) == 2, "the measured cost of the first page forbids a second one"
    assert lines_at(100.0, 3) > 2
    page.finish(30)


def test_an_error_is_logged_and_recorded_even_without_space(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), recorded(tmp_path):
        (tmp_path / EVENTS).mkdir()
        raise ZeroDivisionError("by zero")
    assert "ended by ZeroDivisionError: by zero" in (tmp_path / LOG).read_text()

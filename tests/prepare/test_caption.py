"""`precog caption` through a server on loopback: resume, retries, refusals, and what is never written over."""

import json
import os
import signal
import socket
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import Result

from prepare.videos import probe, sample_frames
from shared.config import Precompute
from shared.media.pool import decode_pool
from tests.chat_server import ChatServer, chat_server, completion, num_images, prompt_of, send
from tests.faults.writer import ended
from tests.media import read, write_clip
from tests.processes import fork_command
from tests.raw_videos import precog, report_of, rows_of, write_project, write_table

KEY = "sk-test-0123456789abcdef"
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def caption(config: Path, server: ChatServer, *options: str) -> Result:
    """One run with two pictures of each clip."""
    return precog(
        "caption", config, "--engine=openai", "--model=vlm", f"--url={server.url}", "--frames=2", "--json", *options
    )


def answer(handler: BaseHTTPRequestHandler, number: int, request: dict[str, Any]) -> None:
    send(handler, completion(f"answer {number}"))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_run_goes_on_with_the_clips_that_are_left(tmp_path: Path) -> None:
    import openai  # noqa: F401 - once, for the fork and this process

    config = write_project(tmp_path, [f"{number:02}.mp4" for number in range(6)])
    children: list[int] = []

    def answer_three(handler: BaseHTTPRequestHandler, number: int, request: dict[str, Any]) -> None:
        if number == 3:
            os.kill(children[0], signal.SIGKILL)
        else:
            answer(handler, number, request)

    with chat_server(answer_three) as server:
        command = ["caption", str(config), "--engine=openai", "--model=vlm", f"--url={server.url}", "--frames=2"]
        children.append(fork_command(command, tmp_path / "errors.txt"))
        assert ended(children[0]) == -signal.SIGKILL and len(server.requests) == 4
    captions = [row["text"] for row in rows_of(tmp_path / "dog.jsonl")]
    assert captions == [f"answer {number}" for number in range(3)] + [""] * 3

    with chat_server(answer) as server:
        report = report_of(caption(config, server))
        assert len(server.requests) == 3 and num_images(server.requests[0]) == 2
    assert report["summary"]["answers asked for"] == 3 and len(report["summary"]["captions written"]) == 3
    captions = [row["text"] for row in rows_of(tmp_path / "dog.jsonl")]
    assert captions[3:] == [f"answer {number}" for number in range(3)]

    write_table(tmp_path / "dog.jsonl", [row | {"text": ""} for row in rows_of(tmp_path / "dog.jsonl")])
    with chat_server(answer) as server:  # a lost table costs nothing
        assert report_of(caption(config, server))["summary"]["answers reused"] == 6 and not server.requests
    assert [row["text"] for row in rows_of(tmp_path / "dog.jsonl")] == captions


def test_failures_of_a_server_are_retried_and_then_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = write_project(tmp_path, ["error.mp4", "garbage.mp4", "limit.mp4", "limits.mp4", "slow.mp4"])
    at_once = {"retry_after_ms": "1"}

    def misbehave(handler: BaseHTTPRequestHandler, number: int, request: dict[str, Any]) -> None:
        if number == 0:
            send(handler, b"oops", 500, **at_once)
        elif number == 2:
            send(handler, b"<html>not json</html>")
        elif number in (3, 5, 6):
            send(handler, b'{"error": {"message": "slow down"}}', 429, **at_once)
        elif number > 6:
            time.sleep(1)
        else:
            answer(handler, number, request)

    with chat_server(misbehave) as server:
        result = caption(config, server, "--tries=2", "--deadline-seconds=0.2")
        assert len(server.requests) == 9 and set(server.keys) == {f"Bearer {KEY}"}
    report = report_of(result)
    assert [row["text"] for row in rows_of(tmp_path / "dog.jsonl")] == ["answer 1", "", "answer 4", "", ""]
    assert report["files"] == {
        "garbage.mp4": "the answer is no chat completion",
        "limits.mp4": "Error code: 429 - slow down (tries: 2)",
        "slow.mp4": "timed out (tries: 2)",
    }
    assert result.exit_code == 1 and "3 clips got no answer" in result.stderr
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.is_file()).decode("utf-8", "replace")
    assert KEY not in result.output + written + "".join(capfd.readouterr())


def test_a_dead_server_is_not_asked_for_every_clip(tmp_path: Path) -> None:
    config = write_project(tmp_path, [f"{number}.mp4" for number in range(5)])
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    result = caption(config, ChatServer(port), "--tries=1")
    reasons = list(report_of(result)["files"].values())
    assert result.exit_code == 1
    assert (
        reasons == ["[Errno 111] Connection refused (tries: 1)"] * 3 + ["not asked: 3 clips in a row got no answer"] * 2
    )


def test_a_wrong_key_stops_at_once_and_is_not_shown(tmp_path: Path) -> None:
    config = write_project(tmp_path, ["a.mp4", "b.mp4"])

    def refuse(handler: BaseHTTPRequestHandler, number: int, request: dict[str, Any]) -> None:
        send(handler, json.dumps({"error": {"message": f"no such key: {KEY}"}}).encode(), 401)

    with chat_server(refuse) as server:
        result = caption(config, server)
        assert result.exit_code == 2 and len(server.requests) == 1
    assert "no such key: ***" in result.stderr and "OPENAI_API_KEY" in result.stderr and KEY not in result.output


def test_answers_that_are_no_caption_are_named(tmp_path: Path) -> None:
    config = write_project(tmp_path, ["cut.mp4", "empty.mp4", "filter.mp4", "sorry.mp4", "think.mp4"])
    bodies = [
        completion("a dog runs and", "length"),
        completion(None),
        completion("", "content_filter"),
        completion("I'm sorry, but I can't help with that."),
        completion('<think>hm</think>\n"A dog\nruns."'),
    ]
    with chat_server(lambda handler, number, request: send(handler, bodies[number])) as server:
        result = caption(config, server)
    report = report_of(result)
    assert result.exit_code == 0
    assert {name: reason.split(":")[0] for name, reason in report["files"].items()} == {
        "cut.mp4": "cut off after 512 tokens",
        "empty.mp4": "empty answer",
        "filter.mp4": "refused",
        "sorry.mp4": "refused",
    }
    assert [row["text"] for row in rows_of(tmp_path / "dog.jsonl")] == ["", "", "", "", "A dog runs."]
    assert [finding["kind"] for finding in report["findings"]] == ["empty"]


def test_what_a_person_wrote_is_never_written_over(tmp_path: Path) -> None:
    config = write_project(tmp_path, ["a.mp4", "b.mp4", "c.mp4"])
    table = tmp_path / "dog.jsonl"
    rows = rows_of(table)
    rows[0]["text"] = "written before"
    write_table(table, rows)

    def edit_and_answer(handler: BaseHTTPRequestHandler, number: int, request: dict[str, Any]) -> None:
        if number == 0:  # while the model works on b.mp4
            write_table(table, [rows[0], rows[1] | {"text": "written meanwhile"}, rows[2]])
        answer(handler, number, request)

    with chat_server(edit_and_answer) as server:
        report = report_of(caption(config, server))
        assert len(server.requests) == 2
    assert [row["text"] for row in rows_of(table)] == ["written before", "written meanwhile", "answer 1"]
    assert report["summary"]["captions written"] == ["c.mp4"]


def test_a_second_model_rewrites_each_description(tmp_path: Path) -> None:
    config = write_project(tmp_path, ["a.mp4", "b.mp4"], id_token="sks dog")
    with chat_server(answer) as server:
        report_of(caption(config, server, "--rewrite=writer"))
        assert [request["model"] for request in server.requests] == ["vlm", "writer", "vlm", "writer"]
        assert [num_images(request) for request in server.requests] == [2, 0, 2, 0]
        assert "answer 0" in prompt_of(server.requests[1]) and "50 to 100 words" in prompt_of(server.requests[1])
    assert [row["text"] for row in rows_of(tmp_path / "dog.jsonl")] == ["answer 1", "answer 3"]


def test_windows_of_one_video_are_clips_of_their_own(tmp_path: Path) -> None:
    config = write_project(tmp_path, ["a.mp4"])
    windows = [{"start_seconds": 0.0, "end_seconds": 0.25}, {"start_seconds": 0.25, "end_seconds": 0.5}]
    write_table(tmp_path / "dog.jsonl", [{"video": "a.mp4", "text": "", **window} for window in windows])
    with chat_server(answer) as server:
        assert report_of(caption(config, server))["summary"]["captions written"] == [
            "a.mp4 from 0 s to 0.25 s",
            "a.mp4 from 0.25 s to 0.5 s",
        ]
        pictures = [json.dumps(request["messages"]) for request in server.requests]
    assert len(set(pictures)) == 2


def test_wrong_arguments_end_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_project(tmp_path, ["a.mp4"])
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for option, words in (
        ("--url=http://user:word@host/v1", "without user or password"),
        ("--url=", "give the server's --url, or set OPENAI_API_KEY"),
        ("data.dataset_name=clips.csv", "data.dataset_name: expected a .jsonl table, got 'clips.csv'"),
    ):
        result = precog("caption", config, "--engine=openai", "--model=vlm", option)
        assert result.exit_code == 2 and words in result.stderr


@pytest.mark.parametrize(("name", "late"), [("a.mkv", 0.0), ("a.mkv", 2.0), ("a.ts", 0.0)])
def test_pictures_are_taken_in_the_middle_of_equal_parts(name: str, late: float, tmp_path: Path) -> None:
    times = [round(late * 1000) + 100 * index for index in range(20)]
    options: dict[str, Any] = {"times": times, "audio_seconds": 0.5} if name.endswith("mkv") else {}
    path = write_clip(tmp_path / name, frames=20, rate=10, height=96, width=160, **options)  # .ts begins at 1.4 s

    with decode_pool(Precompute(cache="none")) as pool:
        video = probe(pool, path)
        for count, start, end, expected in (
            (4, late, late + 2, [2, 7, 12, 17]),
            (2, late + 1, late + 1.6, [11, 14]),
            (1, 50, 60, [19]),
            (4, None, None, [2, 7, 12, 17]),
        ):
            pictures = sample_frames(pool, path, video, count, start, end)
            assert [read(np.asarray(picture)) for picture in pictures] == expected


def test_a_row_that_leads_out_of_the_data_root_is_not_sent(tmp_path: Path) -> None:
    config = write_project(tmp_path, ["a.mp4"])
    write_clip(tmp_path / "private.mp4", codec="mpeg4", bframes=0)
    (tmp_path / "videos" / "link.mp4").symlink_to(tmp_path / "private.mp4")
    names = ["../private.mp4", str(tmp_path / "private.mp4"), "link.mp4", "gone.mp4"]
    write_table(tmp_path / "dog.jsonl", [{"video": name, "text": ""} for name in names])
    with chat_server(answer) as server:
        reasons = list(report_of(caption(config, server))["files"].values())
        assert not server.requests
    for reason, words in zip(reasons, ("has '..'", "is absolute", "leaves the data root", "not found"), strict=True):
        assert words in reason

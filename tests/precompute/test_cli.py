"""The commands of stage 1: their JSON lines, exit codes and one-line faults."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from precog import app
from shared.config import save_config
from tests.corpus import config_for, write_corpus


@pytest.fixture
def config(pipeline: Path, tmp_path: Path) -> str:
    root = write_corpus(tmp_path / "clips", 3)
    (root / "001.mp4").write_bytes(b"no video")
    save_config(config_for(pipeline, root, tmp_path / "cache"), tmp_path / "config.toml")
    return str(tmp_path / "config.toml")


def command(*arguments: str) -> tuple[int, str]:
    """Exit code and standard output."""
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout


def test_plan_and_precompute_end_with_one_json_line_of_the_same_shape(config, tmp_path):
    code, output = command("plan", config, "--json")
    planned = json.loads(output)
    assert code == 0 and not (tmp_path / "cache").exists()
    code, output = command("precompute", config, "--json")
    made = json.loads(output)
    assert code == 0
    assert planned["latents"] == {"planned": 2, "reused": 0} and made["latents"] == {"encoded": 2, "reused": 0}
    assert planned["prompts"] == {"planned": 5, "reused": 0} and made["prompts"] == {"encoded": 5, "reused": 0}
    assert planned["skipped"] == made["skipped"] and [bad["source"] for bad in made["skipped"]] == ["001.mp4"]
    assert planned.keys() >= made.keys() - {"truncated", "written_bytes", "clips_per_second", "waited_share"}
    assert made["clips_per_second"] > 0 and 0 < sum(made["waited_share"].values()) < 1


def test_of_the_processes_of_a_launcher_one_prints_the_json_line(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for action in ("plan", "precompute"):
        for rank, lines in (("1", 0), ("0", 1)):
            monkeypatch.setenv("RANK", rank)
            assert command(action, config, "--json")[1].count("\n") == lines, (action, rank)
    monkeypatch.setenv("RANK", "2")
    result = CliRunner().invoke(app, ["precompute", config, "--json"])
    assert result.exit_code == 2 and result.stderr.startswith("precog: RANK = 2 and WORLD_SIZE = 2 in")


def test_a_part_without_a_launcher_prints_its_json_line(config):
    assert json.loads(command("precompute", config, "--json", "--part=2/2")[1])["clips"] == 2


def test_captions_that_are_cut_short_are_listed_each_once(config, tmp_path):
    """Two windows of one clip share its caption; prompts beside the captions count too."""
    table = tmp_path / "clips" / "prompts.txt"
    table.write_text("short\nbad\n" + "a very long caption " * 20)
    settings = ["data.random_flip=true", f"data.validation_prompts=['a', '{'b ' * 60}']"]
    result = CliRunner().invoke(app, ["precompute", config, *settings, "--json"])
    found = json.loads(result.stdout)["truncated"]
    named = [(caption["source"], caption["caption"]) for caption in found]
    assert named == [("002.mp4", 1), ("data.validation_prompts", 2)] and all(caption["tokens"] > 0 for caption in found)
    assert f"cut short 002.mp4, caption 1: its last {found[0]['tokens']} tokens" in result.stderr
    assert re.search(r"captions cut short +2\n", result.stderr)


def test_what_is_skipped_is_counted_by_kind_and_listed_by_name(config, tmp_path):
    (tmp_path / "clips" / "000.mp4").write_bytes(b"no video either")
    for action in ("plan", "precompute"):
        shown = CliRunner().invoke(app, [action, config]).stderr
        assert re.search(r"  skipped: not a video +2\n", shown)
        assert "skipped 000.mp4: not a video: " in shown and "skipped 001.mp4: not a video: " in shown


def test_with_clips_skipped_not_everything_is_stored_and_how_to_try_again_is_said_once(config):
    hint = "precompute.retry_skipped=true tries the skipped clips again."
    nothing = "Nothing was encoded: everything but the skipped clips is stored already."
    first, second, retried = (
        CliRunner().invoke(app, ["precompute", config, *more]).stderr
        for more in ([], [], ["precompute.retry_skipped=true"])
    )
    assert (first.count(hint), second.count(hint), retried.count(hint)) == (1, 1, 0)
    assert (nothing in first, nothing in second, nothing in retried) == (False, True, True)
    assert not any("everything is stored already" in shown for shown in (first, second, retried))


def test_a_calibrated_plan_has_hours_and_says_from_how_much(config, tmp_path):
    result = CliRunner().invoke(app, ["plan", config, "--calibrate", "--json"])
    planned = json.loads(result.stdout)
    assert planned["hours"] > 0 and (planned["calibration"]["clips"], planned["calibration"]["prompts"]) == (2, 5)
    assert "an estimate from 2 clips and 5 prompts" in result.stderr
    assert not (tmp_path / "cache").exists()


def test_verify_ends_with_4_on_damage_and_with_0_once_it_is_set_aside(config, tmp_path):
    cache = str(tmp_path / "cache")
    assert command("precompute", config)[0] == 0
    assert command("cache", "verify", cache)[0] == 0 and command("cache", "ls", cache)[0] == 0
    tar = min((tmp_path / "cache").glob("latents/*/*/*.tar"))
    content = bytearray(tar.read_bytes())
    content[600] ^= 1
    tar.write_bytes(content)
    assert [command("cache", "verify", cache, *more)[0] for more in ([], ["--repair"], [])] == [4, 0, 0]


def test_what_verify_does_with_damage_is_said_once(config, tmp_path):
    cache = str(tmp_path / "cache")
    assert command("precompute", config)[0] == 0
    receipt = min((tmp_path / "cache").glob("latents/*/*/*.json"))
    receipt.write_text("{}")
    found, repaired = (
        CliRunner().invoke(app, ["cache", "verify", cache, *more]).stderr.splitlines() for more in ([], ["--repair"])
    )
    assert len(found) == len(repaired) == 2
    assert found[0].startswith(f"damaged: {receipt}: damaged receipt (") and found[1].endswith("to set them aside")
    assert repaired[0].startswith(f"set aside: {receipt}: damaged receipt (") and repaired[1].endswith("1 set aside")
    assert [line.count("--repair") for line in (*found, *repaired)] == [0, 1, 0, 0]


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_part_that_is_none_is_a_usage_error(config, part):
    assert command("precompute", config, f"--part={part}")[0] == 2


def test_ray_divides_the_work_itself(config):
    assert command("precompute", config, "--engine=ray", "--part=1/2")[0] == 2


@pytest.mark.skipif(torch.cuda.device_count() > 98, reason="there is one")
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_read(config, tmp_path):
    shutil.rmtree(tmp_path / "clips")
    result = CliRunner().invoke(app, ["precompute", config, "precompute.device=cuda:98"])
    assert result.exit_code == 2 and "device = 'cuda:98': torch sees " in result.stderr


def test_faults_of_the_user_end_with_their_codes(config, tmp_path):
    assert command("precompute", config, "precompute.cache=http://x")[0] == 2
    assert command("plan", config, "precompute.nonsense=1")[0] == 2
    for name in (config, f"{config}/below"):  # a file, where a folder should be
        assert command("plan", config, f"precompute.cache={name}")[0] == 2
    for action in ("ls", "verify"):
        assert command("cache", action, str(tmp_path / "nowhere"))[0] == 2
    (tmp_path / "clips" / "prompts.txt").write_text("only one")
    assert command("plan", config)[0] == 3

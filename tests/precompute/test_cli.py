"""The commands of stage 1: JSON lines, exit codes, one-line faults, and the end after a signal."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import av
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from precog import app
from shared.cache.storage import LocalStorage
from shared.cache.view import read_view
from shared.config_file import save_config
from tests.corpus import config_for, write_corpus
from tests.processes import decoders, fork_command, wait_until


@pytest.fixture
def config(pipeline: Path, tmp_path: Path) -> str:
    root = write_corpus(tmp_path / "clips", 3)
    (root / "001.mp4").write_bytes(b"no video")
    save_config(config_for(pipeline, root, tmp_path / "cache"), tmp_path / "config.toml")
    return str(tmp_path / "config.toml")


def command(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.stderr
    return result


def test_plan_and_precompute_print_the_same_json_and_name_skips(config: str, tmp_path: Path) -> None:
    (tmp_path / "clips" / "000.mp4").write_bytes(b"no video either")
    plan = command("plan", config, "--json")
    assert not (tmp_path / "cache").exists()
    run = command("precompute", config, "--json", "--part=2/2")
    planned, made = json.loads(plan.stdout), json.loads(run.stdout)
    assert planned["latents"] == {"planned": 1, "reused": 0} and made["latents"] == {"encoded": 1, "reused": 0}
    assert planned["prompts"] == {"planned": 5, "reused": 0} and made["prompts"] == {"encoded": 5, "reused": 0}
    assert planned["skipped"] == made["skipped"]
    assert [bad["source"] for bad in made["skipped"]] == ["000.mp4", "001.mp4"]
    assert planned.keys() >= made.keys() - {"retryable", "written_bytes", "clips_per_second", "waited_share"}
    assert made["clips_per_second"] > 0 and 0 < sum(made["waited_share"].values()) < 1
    for shown in (plan.stderr, run.stderr):
        assert re.search(r"  skipped: not a video +2\n", shown)
        assert "skipped 000.mp4: not a video: " in shown and "skipped 001.mp4: not a video: " in shown
    hint = "precompute.retry_skipped"  # cannot help: these files are looked at in every run
    nothing = "Nothing was encoded: everything but the skipped clips is stored already."
    retried = command("precompute", config, "precompute.retry_skipped=true").stderr
    assert (run.stderr + retried).count(hint) == retried.count("retry_skipped = true")
    assert (nothing in run.stderr, nothing in retried) == (False, True)


def test_rank_0_alone_prints_the_json_line(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        assert command("plan", config, "--json").stdout.count("\n") == lines


def test_captions_and_prompts_that_are_cut_short_are_named(config: str, tmp_path: Path) -> None:
    (tmp_path / "clips" / "prompts.txt").write_text("short\nbad\n" + "a very long caption " * 20)
    result = command("precompute", config, f"data.validation_prompts=['a', '{'b ' * 60}']", "--json")
    found = {finding["kind"]: finding for finding in json.loads(result.stdout)["findings"]}
    assert found["too_long"]["sources"] == ["002.mp4"] and found["too_long_prompt"]["sources"] == ["b " * 60]
    assert "warning: 1 of 2 captions are longer than 16 tokens; up to " in " ".join(result.stderr.split())


def test_a_plan_whose_clips_are_all_skipped_ends_with_3(config: str, tmp_path: Path) -> None:
    for name in ("000", "002"):
        (tmp_path / "clips" / f"{name}.mp4").write_bytes(b"no video either")
    shown = command("plan", config, code=3).stderr.splitlines()
    assert shown[-1].startswith("precog: data.name = 'corpus': every clip is skipped; ")
    assert sum(line.startswith("skipped 00") for line in shown) == 3


def test_ls_and_verify_print_json_and_damage_once(filled: tuple[Path, Path]) -> None:
    cache = str(filled[1])
    listed = json.loads(command("cache", "ls", cache, "--json").stdout)
    latents, prompts = listed["collections"].values()
    assert (latents["samples"], latents["buckets"], prompts["samples"]) == (6, {"5x16x32": 6}, 8)
    assert listed["datasets"]["corpus"]["train"] == 6 and listed["datasets"]["corpus"]["skipped"] == 0
    assert json.loads(command("cache", "verify", cache, "--json").stdout)["damaged"] == []

    receipt = min(filled[1].glob("latents/*/*/*.json"))
    receipt.write_text("{}")
    found, repaired = (
        command("cache", "verify", cache, "--json", *more, code=code) for more, code in (([], 4), (["--repair"], 0))
    )
    [fault] = json.loads(found.stdout)["damaged"]
    assert fault.startswith(f"{receipt}: damaged receipt (") and json.loads(repaired.stdout)["repaired"] is True
    first, last = found.stderr.splitlines()
    assert first == f"damaged: {fault}" and last.endswith("add --repair to set them aside")
    first, last = repaired.stderr.splitlines()
    assert first == f"set aside: {fault}" and last.endswith("1 set aside")
    command("cache", "verify", cache)


def test_a_cache_is_pushed_shown_and_cleaned(filled: tuple[Path, Path], tmp_path: Path) -> None:
    copied = str(tmp_path / "copied")
    pushed = json.loads(command("cache", "push", copied, str(filled[1]), "--json").stdout)
    assert pushed["views"] == ["corpus"] and pushed["shards"] == 3 and pushed["bytes"] > 0
    again = json.loads(command("cache", "pull", str(filled[1]), copied, "--json").stdout)
    assert again == {"shards": 0, "bytes": 0, "views": [], "kept": []}
    key = read_view(LocalStorage(copied), "corpus").rows[0].latent_key
    shown = json.loads(command("cache", "show", key[:20], copied, "--json").stdout)
    assert shown["key"] == key and shown["bucket"] == "5x16x32" and shown["views"][0].startswith("corpus: 0")
    assert shown["moments"].startswith("F32 [32, 2, 2, 4]") and shown["recipe"]["kind"] == "latents"
    assert shown["thumbnails"] == "U8 [2, 3, 2, 4]"
    command("cache", "show", "", copied, code=2)
    command("cache", "show", "0" * 32, copied, code=2)
    Path(copied, "datasets/corpus.json").unlink()
    waiting = command("cache", "gc", copied)
    assert "3 shards that no view names are kept" in waiting.stderr
    planned = command("cache", "gc", copied, "--dry-run", "--min-age-hours=0")
    assert "shards that no view names: 6 files" in planned.stderr and any(Path(copied).rglob("*.tar"))
    assert json.loads(command("cache", "gc", copied, "--min-age-hours=0", "--json").stdout)["deleted"] is True
    assert not any(path.is_file() for path in Path(copied).rglob("*"))


def test_a_stored_clip_is_decoded(
    filled: tuple[Path, Path], pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = read_view(LocalStorage(str(filled[1])), "corpus").rows[0]
    shown = json.loads(command("cache", "show", row.latent_key, f"--decode={pipeline}", "--json").stdout)
    with av.open(str(tmp_path / shown["video"])) as video:
        stream = video.streams.video[0]
        assert (stream.height, stream.width, len(list(video.decode(stream)))) == (16, 32, 8)
    refused = command("cache", "show", row.prompt_keys[0], f"--decode={pipeline}", code=2).stderr
    assert f"--decode: {row.prompt_keys[0]} is not a stored clip" in refused
    other = shutil.copytree(pipeline, tmp_path / "other")
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    assert "another VAE" in command("cache", "show", row.latent_key, f"--decode={other}", code=2).stderr


@pytest.mark.skipif(torch.cuda.device_count() > 98, reason="there is one")
def test_a_missing_gpu_is_refused_before_anything_is_read(config: str, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "clips")
    shown = command("precompute", config, "precompute.device=cuda:98", code=2).stderr
    assert "device = 'cuda:98': torch sees " in shown


def test_faults_of_the_user_end_with_their_codes(config: str, tmp_path: Path) -> None:
    command("precompute", config, "precompute.cache=http://x", code=2)
    command("precompute", config, "--engine=ray", "--part=1/2", code=2)
    for name in (config, f"{config}/below"):  # a file instead of a folder
        command("plan", config, f"precompute.cache={name}", code=2)
    for action in ("ls", "verify"):
        command("cache", action, str(tmp_path / "nowhere"), code=2)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("phase", ["decoding", "encoding"])
def test_a_signal_ends_the_command_with_75_one_line_and_no_process(phase: str, pipeline: Path, tmp_path: Path) -> None:
    root, cache = write_corpus(tmp_path / "clips", 6), tmp_path / "cache"
    save_config(config_for(pipeline, root, cache, clips_per_shard=2), tmp_path / "config.toml")
    child = fork_command(["precompute", str(tmp_path / "config.toml")], tmp_path / "errors")
    try:
        if phase == "decoding":  # a decoder that hangs
            wait_until(lambda: [path for path in cache.glob("prompts/*/*") if path.name != "recipe.json"])
            decoders(child)[0].suspend()
            time.sleep(0.5)
        else:
            wait_until(lambda: any(cache.glob("latents/*/*/*.json")))
        children = psutil.Process(child).children(recursive=True)
        sent = time.monotonic()
        os.kill(child, signal.SIGTERM if phase == "decoding" else signal.SIGINT)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    finally:
        for process in psutil.Process().children(recursive=True):
            if process.pid == child:
                process.kill()
    assert time.monotonic() - sent < 10
    assert children and psutil.wait_procs(children, timeout=1)[1] == []
    lines = (tmp_path / "errors").read_text("utf-8").splitlines()
    line = "precog: stopped by a signal: finished shards are stored; the same command goes on from here"
    assert lines[-1] == line and sum(each.startswith("precog: ") for each in lines) == 1
    assert not any("Traceback" in each for each in lines)
    assert any(cache.glob("latents/*/*/*.json")) is (phase == "encoding")

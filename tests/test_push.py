"""Adapters and caches are uploaded whole, whatever ends the upload, and the token stays in the request's header."""

import json
import logging
import os
import runpy
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner, Result

from precog import app
from shared.config import Config
from shared.fingerprint import sha256_file
from shared.signals import StopSignal
from tests import tiny
from tests.experiments import changed
from tests.processes import fork_command
from tests.upload_server import UploadServer, serving
from train.loop import train

Settings = Callable[..., Config]
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # huggingface_hub's own upload
CAPTIONS = (Path(__file__).parents[1] / "demo" / "clips" / "prompts.txt").read_text("utf-8").split("\n")
CANARY = "hf_canaryCANARYcanaryCANARYcanary123"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadServer]:
    with serving() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", CANARY)
        yield server


@pytest.fixture(scope="module")
def trained(experiment: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Return a finished run with a sample video, a trigger and a best adapter."""
    folder = tmp_path_factory.mktemp("trained")
    values = {"output_dir": folder / "zorp", "max_train_steps": 4, "checkpointing_steps": 2}
    sample = {"output_dir": folder / "samples", "num_frames": 9, "height": 32, "width": 48, "num_inference_steps": 2}
    config = changed(experiment, train=values, data={"id_token": ""}, sample=sample)
    train(config, StopSignal())
    earlier, export = folder / "zorp" / "checkpoint-000002" / "adapter.safetensors", folder / "zorp" / "export"
    shutil.copyfile(earlier, export / "best" / "pytorch_lora_weights.safetensors")
    (folder / "zorp" / "loss.png").write_bytes(b"made of 20 steps or more")
    (folder / "samples").mkdir()
    ours = sha256_file(export / "pytorch_lora_weights.safetensors")
    others = {"00-base": [], "01-other": [{"sha256": "0" * 64}]}
    for name, loras in ({"00-lora": [{"sha256": ours}], "02-caption": [{"sha256": ours}]} | others).items():
        record = {"prompt": CAPTIONS[0] if name == "02-caption" else "a red cube", "recipe": {"loras": loras}}
        (folder / "samples" / f"{name}.json").write_text(json.dumps(record), "utf-8")
        (folder / "samples" / f"{name}.mp4").write_bytes(name.encode())
    return config


@pytest.fixture
def run(trained: Config, tmp_path: Path) -> Path:
    shutil.copytree(trained.train.output_dir, tmp_path / "zorp")
    return tmp_path / "zorp"


def push(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["push", *map(str, arguments)])


def local_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_arrives_is_the_dry_run_and_private(hub: UploadServer, run: Path, trained: Config) -> None:
    assert push(run, "someone/zorp", "--dry-run").exit_code == 0
    assert hub.requests == []
    written = local_files(run / "hub")
    expected = ["pytorch_lora_weights.safetensors", "best/pytorch_lora_weights.safetensors", "comfyui/zorp.safetensors"]
    assert {*expected, "README.md", "loss.png", "samples/00.mp4", "samples/01.mp4"} == written.keys()
    done = push(run, "someone/zorp", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["url"] == f"{hub.url}/someone/zorp"
    assert hub.repositories == {"someone/zorp": written}
    assert hub.private == {"someone/zorp": True}
    commits, sent = len(hub.commits), hub.sent_bytes
    assert push(run, "someone/zorp").exit_code == 0
    assert (len(hub.commits), hub.sent_bytes) == (commits, sent), "nothing is sent twice"
    assert push(run, "someone/open", "--public").exit_code == 0
    assert not hub.private["someone/open"]


def test_the_card_says_what_was_trained_and_no_caption(run: Path, trained: Config) -> None:
    push(run, "someone/zorp", "--dry-run")
    card = ModelCard.load(run / "hub" / "README.md")
    assert card.data.pipeline_tag == "text-to-video" and "lora" in card.data.tags
    texts = [(entry["text"], entry["output"]["url"]) for entry in card.data.widget]
    assert texts == [("a red cube", "samples/00.mp4"), ("...", "samples/01.mp4")], "the second prompt is a caption"
    assert (card.data.license, card.data.license_name) == ("other", "cogvideox-license")
    for text in (
        "rank 4 and alpha 8",
        "4 steps",
        "7 clips",
        "1 held out",
        "Held-out loss with the LoRA",
        "train.seed",
    ):
        assert text in card.text, text
    every = "".join(content.decode(errors="replace") for content in local_files(run / "hub").values())
    assert not any(caption and caption in every for caption in CAPTIONS)
    assert str(Path.home()) not in card.content and str(run.parent) not in card.content
    push(run, "someone/zorp", "--dry-run", "--with-captions")
    assert set((run / "hub" / "captions.txt").read_text("utf-8").split("\n")) <= set(CAPTIONS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_cards_example_runs(run: Path, trained: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(run, "someone/zorp", "--dry-run")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run / "hub", tmp_path / "someone" / "zorp")
    model = Path(trained.model.pretrained_model_name_or_path)
    tiny.save_pipeline("2b", tmp_path / model.name, text_length=226)  # diffusers' default
    example = (run / "hub" / "README.md").read_text("utf-8").split("```python\n")[1].split("```")[0]
    (tmp_path / "example.py").write_text(example, "utf-8")
    runpy.run_path("example.py")
    assert (tmp_path / "video.mp4").stat().st_size > 0


@pytest.mark.parametrize("request_number", [2, 5, 8])
def test_a_killed_push_is_completed_by_the_same_command(hub: UploadServer, run: Path, request_number: int) -> None:
    hub.fault = lambda number, path: "kill" if number == request_number else None
    hub.victim = fork_command(["push", str(run), "someone/zorp"], run / "errors.txt")
    assert os.waitstatus_to_exitcode(os.waitpid(hub.victim, 0)[1]) == -9, (run / "errors.txt").read_text()
    hub.fault = lambda number, path: None
    objects = dict(hub.objects)
    assert push(run, "someone/zorp").exit_code == 0
    assert hub.repositories == {"someone/zorp": local_files(run / "hub")}
    assert hub.sent_bytes == sum(map(len, hub.objects.values())), f"{len(objects)} objects are not sent again"


@pytest.mark.parametrize(
    ("statuses", "least"),
    [((403,), 30), pytest.param((400, 401, 403, 404, 413, 429, 500, 503), 200, marks=pytest.mark.faults)],
)
def test_the_token_is_in_no_output(
    hub: UploadServer,
    run: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    statuses: tuple[int, ...],
    least: int,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's retries of 5xx
    outputs = 0
    for status in statuses:
        for at in range(1, 30):
            hub.repositories.clear()
            hub.objects.clear()
            hub.requests.clear()
            hub.fault = lambda number, path, at=at, status=status: status if number >= at else None  # type: ignore[misc]
            done = push(run, "someone/zorp")
            raised = "".join(traceback.format_exception(done.exception)) if done.exception else ""
            for text in (done.stdout, done.stderr, raised):
                assert CANARY not in text
                outputs += 1
            if done.exit_code == 0:
                break
            assert done.exit_code == (2 if status in (401, 403, 404) else 1), done.stderr
            assert len(done.stderr.strip().split("precog: ")) == 2, done.stderr
        assert done.exit_code == 0, "no request is left to fail"
    assert outputs >= least
    ours = [record for record in caplog.records if record.name.split(".")[0] not in ("httpcore2", "httpcore")]
    assert not any(CANARY in record.getMessage() for record in ours), "httpcore's own trace shows what the server sends"
    assert not any(CANARY.encode() in content for content in local_files(run).values())


def test_a_name_that_is_no_repository_is_refused(run: Path) -> None:
    done = push(run, "zorp")
    assert done.exit_code == 2 and "not a repository of the hub; write it as user/name" in " ".join(done.stderr.split())


def test_a_cache_becomes_a_whole_data_set(hub: UploadServer, experiment: Config, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(experiment.precompute.cache, cache)
    command = ["cache", "push", "hf://datasets/someone/clips", str(cache)]
    hub.fault = lambda number, path: "kill" if "commit" in path and len(hub.commits) == 1 else None
    hub.victim = fork_command(command, tmp_path / "errors.txt")
    assert os.waitstatus_to_exitcode(os.waitpid(hub.victim, 0)[1]) == -9, (tmp_path / "errors.txt").read_text()
    hub.fault = lambda number, path: None
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.stderr
    arrived = hub.repositories["datasets/someone/clips"]
    local = ("assignments/", "probes/")  # of use to the workers of this cache alone, as its indexes are
    files = {name: content for name, content in local_files(cache).items() if not name.endswith("/index.bin")}
    kept = {name: content for name, content in files.items() if not name.startswith(local)}
    assert not any(name.startswith(local) for name in arrived)
    assert {name: arrived[name] for name in kept} == kept
    assert arrived.keys() - kept.keys() == {"README.md", "preview.parquet"}
    for name, content in arrived.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    assert CliRunner().invoke(app, ["cache", "verify", str(tmp_path / "copy")]).exit_code == 0
    assert hub.private == {"datasets/someone/clips": True}
    tars = [number for number, names in enumerate(hub.commits) if any(name.endswith(".tar") for name in names)]
    views = [number for number, names in enumerate(hub.commits) if any("datasets/clips.json" in name for name in names)]
    assert max(tars) < min(views)
    rows: list[dict[str, Any]] = parquet.read_table(tmp_path / "copy" / "preview.parquet").to_pylist()
    assert len(rows) == 7 and all(row["image"]["bytes"][:4] == b"\x89PNG" and row["caption"] for row in rows)
    tar = next(cache.glob("latents/*/*/*.tar"))
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    assert CliRunner().invoke(app, command).exit_code == 4

"""Each command downloads only the components it needs from a hub, whose protocol is served on loopback."""

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from precog import app
from tests import media

ROOT = Path(__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """A hub with one repository, `someone/tiny`, made of demo/mini."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        mini = ROOT / "demo" / "mini"
        self.files = {path.relative_to(mini).as_posix(): path for path in mini.rglob("*.*")}
        self.fetched: set[str] = set()
        """Weight files that were requested, with the range if there was one."""


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers of the hub."""

    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, span = self.path.partition("?")[0], self.headers.get("range")
        file = re.fullmatch(rf"/someone/tiny/resolve/(?:main|{COMMIT})/(.+)", path)
        if path == "/api/models/someone/tiny/revision/main":
            content = json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": []}).encode()
        elif path.startswith("/api/models/someone/tiny/tree/"):
            entries = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
                for name, file in self.server.files.items()
            ]
            content = json.dumps(entries).encode()
        elif file and file[1] in self.server.files:
            content = self.server.files[file[1]].read_bytes()
            if self.command == "GET" and file[1].endswith(".safetensors"):
                self.server.fetched.add(file[1] + (f" {span}" if span else ""))
        else:
            self.send_error(404)
            return
        etag = hashlib.sha256(content).hexdigest()
        self.send_response(206 if span else 200)
        if span:
            first, last = map(int, span.removeprefix("bytes=").split("-"))
            content = content[first : last + 1]
        for name, value in (("ETag", f'"{etag}"'), ("X-Repo-Commit", COMMIT), ("Content-Length", str(len(content)))):
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_each_command_downloads_its_own_part(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check above all that stage 1 leaves out the transformer (11 GB of a 5B) and stage 2 T5 and the VAE."""
    (tmp_path / "clips").mkdir()
    media.write_clip(tmp_path / "clips" / "one.mp4", height=64, width=96)
    (tmp_path / "clips" / "one.txt").write_text("one", "utf-8")
    settings = {
        "model.pretrained_model_name_or_path": "someone/tiny",
        "data.instance_data_root": tmp_path / "clips",
        "data.held_out_clips": 0,
        "data.frame_buckets": [9],
        "precompute.cache": tmp_path / "cache",
        "train.output_dir": tmp_path / "run",
        "train.max_train_steps": 1,
        "train.global_batch_size": 1,
        "train.mixed_precision": "auto",
        "memory.activations": "full",  # one plan to simulate
        "memory.offload_activations": "false",
        "memory.stream_weights": 0,
    }
    overrides = [f"{name}={value}" for name, value in settings.items()]
    monkeypatch.chdir(ROOT)
    for name, value in {
        "ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HUGGINGFACE_CO_URL_TEMPLATE": f"http://127.0.0.1:{hub.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    fetched = []
    for number, command in enumerate((["plan", "--card=4090"], ["precompute"], ["train"])):
        hub.fetched.clear()
        place = f"model.model_cache_dir={tmp_path}/{number}"
        found = CliRunner().invoke(app, [*command, "configs/demo-real.toml", *overrides, place])
        assert found.exit_code == 0, found.stderr
        fetched.append(set(hub.fetched))
    vae, transformer = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("vae", "transformer"))
    encoders = {vae, "text_encoder/model.safetensors"}
    assert fetched == [encoders | {f"{transformer} bytes=0-100000"}, encoders, {transformer}]

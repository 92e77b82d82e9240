"""The part of the hub's API that uploads use, on loopback: repositories, LFS objects and commits, with faults."""

import base64
import hashlib
import http.server
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.processes import wait_until

LARGE = (".safetensors", ".tar", ".mp4", ".png", ".parquet")


class UploadServer(http.server.ThreadingHTTPServer):
    """Repositories by name; `fault` gets each request's number and path and returns a status, "kill" or None."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[list[str]] = []
        self.sent_bytes = 0
        self.requests: list[str] = []
        self.fault: Callable[[int, str], int | str | None] = lambda number, path: None
        self.victim = 0
        """Process that "kill" kills."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers of the hub. An error's text repeats the request's headers, token and all."""

    server: UploadServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.do_POST()

    def do_PUT(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        content = self.read_body()
        self.server.requests.append(f"{self.command} {self.path}")
        fault = self.server.fault(len(self.server.requests), self.path)
        if fault == "kill":
            wait_until(lambda: self.server.victim)
            os.kill(self.server.victim, signal.SIGKILL)
        elif isinstance(fault, int):
            self.answer({"error": f"refused for {self.headers['authorization']}"}, fault)
        else:
            self.answer(*self.handle_request(content))

    def read_body(self) -> bytes:
        """Return the request's content, sent whole or in chunks."""
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def answer(self, body: Any, status: int = 200) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        if status >= 400:
            self.send_header("X-Error-Message", body["error"])
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def handle_request(self, content: bytes) -> tuple[Any, int]:
        path, server = self.path.partition("?")[0], self.server
        if path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{'datasets/' if asked.get('type') == 'dataset' else ''}{asked['organization']}/{asked['name']}"
            status = 409 if name in server.repositories else 200
            server.repositories.setdefault(name, {})
            server.private.setdefault(name, asked.get("visibility") == "private" or bool(asked.get("private")))
            return {"url": f"{server.url}/{name}", "error": "exists"}, status
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}, 200
        if found := re.fullmatch(r"/lfs/(\w{64})", path):
            assert hashlib.sha256(content).hexdigest() == found[1], "a torn object"
            server.objects[found[1]] = content
            server.sent_bytes += len(content)
            return {}, 200
        if path.endswith(".git/info/lfs/objects/batch"):
            return {"objects": [self.lfs_object(asked) for asked in json.loads(content)["objects"]]}, 200
        found = re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)/(preupload|commit|revision)/main", path)
        if not found:
            return {"error": f"no such address: {path}"}, 404
        name = "datasets/" * (found[1] == "dataset") + found[2]
        files = server.repositories[name]
        if found[3] == "preupload":
            return {"files": [mode(asked["path"], files) for asked in json.loads(content)["files"]]}, 200
        if found[3] == "commit":
            lines = [json.loads(line) for line in content.splitlines()]
            new = {}
            for line in lines[1:]:
                value = line["value"]
                new[value["path"]] = (
                    server.objects[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
                )
            files |= new
            server.commits.append(sorted(new))
        return {
            "commitUrl": f"{server.url}/{name}/commit/1",
            "commitOid": "1" * 40,
            "id": found[2],
            "sha": "1" * 40,
        }, 200

    def lfs_object(self, asked: dict[str, Any]) -> dict[str, Any]:
        upload = {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}", "header": {}}}
        return asked if asked["oid"] in self.server.objects else {**asked, "actions": upload}


def mode(path: str, files: dict[str, bytes]) -> dict[str, Any]:
    """Return how a file is uploaded, and the hash of the one that is there."""
    large, content = path.endswith(LARGE), files.get(path)
    oid = None
    if content is not None:
        blob = b"blob %d\0" % len(content) + content
        oid = hashlib.sha256(content).hexdigest() if large else hashlib.sha1(blob).hexdigest()
    return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}


@contextmanager
def serving() -> Iterator[UploadServer]:
    """Run a server in a thread."""
    with UploadServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()

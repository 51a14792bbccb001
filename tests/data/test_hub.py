"""A repository of the hub, by a server that answers as the hub does: what is asked for, and that no pickle is."""

import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from components.artifact import ForjaError
from components.data import hub

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"hello",
    "pytorch_model.bin": b"\x80\x04.",
    "modeling_evil.py": b"raise SystemExit",
    "README.md": b"# hello",
    "original/consolidated.00.pth": b"\x80\x04.",
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self, body: bool = True) -> None:
        path = self.path.partition("?")[0]
        type(self).asked.append(path)
        if path.startswith("/api/models/forja/tiny/"):
            if "/tree/" in path:
                answer = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in FILES.items()]
            else:
                answer = {"id": "forja/tiny", "sha": COMMIT, "siblings": [{"rfilename": n} for n in FILES]}
            self.reply(200, json.dumps(answer).encode(), body, "application/json")
        elif path.startswith(f"/forja/tiny/resolve/{COMMIT}/"):
            self.reply(200, FILES[path.split("/", 5)[5]], body)
        else:
            self.reply(404, b"", body, error="RepoNotFound")

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def reply(self, status: int, data: bytes, body: bool, kind: str = "", error: str = "") -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(data)), "Content-Type": kind or "application/octet-stream"}
        headers |= {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}  # noqa: S324  # git's
        headers |= {"X-Error-Code": error} if error else {}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The paths that are asked of the server."""
    from huggingface_hub import constants

    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
        old = getattr(constants, name)
        new = old.replace("https://huggingface.co", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, name, new)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield Hub.asked
    server.shutdown()
    server.server_close()


def test_weights_configurations_and_tokenizer_come_and_nothing_else(served: list[str]) -> None:
    folder = hub.fetch("hf:forja/tiny")
    wanted = {n for n in FILES if n.endswith((".safetensors", ".json", ".jinja"))}
    assert {p.name for p in folder.iterdir()} == wanted
    assert (folder / "model-00002-of-00002.safetensors").read_bytes() == b"two"
    assert not any("pytorch_model" in path or "evil" in path or "original/" in path for path in served)
    with pytest.raises(ForjaError, match="hf:forja/none: not fetched"):
        hub.fetch("hf:forja/none")


def test_a_path_is_seen_from_its_base(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert hub.fetch("model", tmp_path) == tmp_path / "model"
    assert hub.fetch(str(tmp_path / "model"), Path("/elsewhere")) == tmp_path / "model"
    with pytest.raises(ForjaError, match="nowhere: there is no such folder or file"):
        hub.fetch("nowhere", tmp_path)


@pytest.mark.parametrize("name", ["hf:", "hf:../../etc", "hf:a/b/c", "hf:a b"])
def test_a_name_that_is_none_is_said(name: str) -> None:
    with pytest.raises(ForjaError, match="not fetched"):
        hub.fetch(name)

"""Sets of the hub: by a server that answers as the hub does, and by a stand-in for the loader that gives the real types
of `datasets`."""

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

from components.artifact import ForjaError, read_record
from components.data.hfsets import parse
from components.data.ingest import Config, ingest
from components.log import silent

REST = {"licences": None, "exclude_sources": [], "exclude_ids": None}
REST |= {"seed": 0, "package": None, "problems": 0, "limit": None}


def test_what_the_name_says() -> None:
    assert parse("hf:org/name") == ("org/name", None, None)
    assert parse("hf:org/name:es@v1.2") == ("org/name", "es", "v1.2")
    with pytest.raises(ForjaError, match="names no set"):
        parse("hf:")


def test_a_set_is_streamed_with_its_splits_and_licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, **how: Any) -> Any:
        asked.append((name, config, how))
        train = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(50)] + [{"question": "nul", "answer": "a\0"}]
        parts = {"train": train, "test": train[:7]}
        made = {k: datasets.Dataset.from_list(v).to_iterable_dataset() for k, v in parts.items()}
        return datasets.IterableDatasetDict(made)

    def dataset_info(name: str, revision: str | None) -> Any:
        assert (name, revision) == ("org/name", "abc")
        return SimpleNamespace(card_data=SimpleNamespace(license="mit"), sha="abc")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.dataset_info", dataset_info)
    cfg = Config.model_validate({"sources": [{"source": "hf:org/name:main@abc"}], **REST})
    ingest(cfg, tmp_path / "data", silent)
    assert asked == [("org/name", "main", {"revision": "abc", "streaming": True})]
    label = "org-name_main_abc"
    rows = [json.loads(x) for x in (tmp_path / "data" / "instructions" / f"{label}.jsonl").open("rb")]
    assert [r["messages"][1]["content"] for r in rows] == [f"a{i}" for i in [*range(50), *range(7)]]
    assert {r["licence"] for r in rows} == {"mit"}
    assert rows[0]["line"] == f"{label}/train:1" and {r["split"] for r in rows[50:]} == {"test"}
    assert {r["split"] for r in rows[:50]} == {"train", "val", "test"}
    [away] = [json.loads(x) for x in (tmp_path / "data" / "quarantine.jsonl").open("rb")]
    assert (away["file"], away["line"], away["reason"]) == (f"{label}/train", 51, "damaged text: NUL")
    metrics = read_record(tmp_path / "data").metrics
    assert [metrics[f"{label}.{k}"] for k in ("read", "kept", "quarantined")] == [58, 57, 1]


def test_a_set_that_the_hub_does_not_give_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_: Any, **__: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/none' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    cfg = Config.model_validate({"sources": [{"source": "hf:org/none"}], **REST})
    with pytest.raises(ForjaError, match=r"hf:org/none: the hub does not give it \(Dataset 'org/none' doesn't exist"):
        ingest(cfg, tmp_path / "data", silent)
    assert not (tmp_path / "data").exists()


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


class Hub(BaseHTTPRequestHandler):
    """Answers for the set forja/tiny as the hub does, to the calls of `datasets` and `huggingface_hub`."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/forja/tiny/tree/"):
            folder = "/".join(path.split("/")[7:])
            held = [n for n in self.files if PurePosixPath(n).parent == PurePosixPath(folder)]
            tree = [{"type": "file", "path": n, "size": len(self.files[n]), "oid": "0" * 40} for n in held]
            self.reply(
                200,
                json.dumps(
                    tree if folder else [*tree, {"type": "directory", "path": "data", "oid": "0" * 40}]
                ).encode(),
            )
        elif path.startswith("/api/datasets/forja/tiny"):
            card = {"license": "cc-by-4.0"}
            self.reply(200, json.dumps({"id": "forja/tiny", "sha": COMMIT, "cardData": card, "siblings": []}).encode())
        elif path.startswith("/datasets/forja/tiny/resolve/"):
            name = path.split("/", 6)[6]
            self.reply(200 if name in self.files else 404, self.files.get(name, b""), "EntryNotFound")
        else:
            self.reply(404, b"", "RepoNotFound")

    do_HEAD = do_GET

    def reply(self, status: int, data: bytes, error: str = "") -> None:
        tag, size = hashlib.sha256(data).hexdigest(), len(data)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'} | ({"X-Error-Code": error} if status == 404 else {})
        if status == 200 and (asked := self.headers.get("Range")):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            data, status = data[int(first) : int(last or size - 1) + 1], 206
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(data) - 1}/{size}"
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    Hub.files = {
        "README.md": b"---\nlicense: cc-by-4.0\n---\n",
        "data/train-00000-of-00001.parquet": parquet([{"question": f"q{i}", "answer": f"a{i}"} for i in range(60)]),
        "data/test-00000-of-00001.parquet": parquet([{"question": f"t{i}", "answer": f"b{i}"} for i in range(5)]),
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_real_client_reads_a_set_from_a_server(endpoint: str, tmp_path: Path) -> None:
    """In a process of its own, since the client takes its endpoint when it is imported."""
    pytest.importorskip("datasets")
    script = (
        "import sys; from pathlib import Path; from components.data.ingest import Config, ingest\n"
        "from components.log import silent\n"
        "ingest(Config.model_validate_json(sys.argv[1]), Path(sys.argv[2]), silent)"
    )
    cfg = json.dumps({"sources": [{"source": "hf:forja/tiny"}], **REST})
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", script, cfg, str(tmp_path / "data")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(x) for x in (tmp_path / "data" / "instructions" / "forja-tiny.jsonl").open("rb")]
    wanted = [f"a{i}" for i in range(60)] + [f"b{i}" for i in range(5)]
    assert sorted(r["messages"][1]["content"] for r in rows) == sorted(wanted)
    assert {r["licence"] for r in rows} == {"cc-by-4.0"}
    [first] = [r for r in rows if r["messages"][0]["content"] == "q0"]
    assert first["provenance"] == f"hf:forja/tiny@{COMMIT}: forja-tiny/train:1"
    [told] = json.loads((tmp_path / "data" / "sources.json").read_text())
    assert told["from"] == f"hf:forja/tiny@{COMMIT}" and told["licences"] == {"cc-by-4.0": 65}

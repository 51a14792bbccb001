"""Ingest: the five tables from Python's documentation, and from a folder."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from components.artifact import ForjaError, read_record
from components.data import questions
from components.data.ingest import TABLES, Config, ingest
from components.data.sources import Doc, split_of
from components.log import silent

SMALL = Config(source="python-docs", package=None, seed=3, problems=300, limit=900)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ingest") / "data"
    ingest(SMALL, out, silent)
    return out


def read(data: Path, table: str) -> list[dict[str, Any]]:
    return [json.loads(line) for p in sorted((data / table).rglob("*.jsonl")) for line in p.open(encoding="utf-8")]


def test_another_directory_gives_the_same_bytes(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    ingest(SMALL, tmp_path / "again", silent)
    assert (tmp_path / "again" / "record.json").read_bytes() == (small / "record.json").read_bytes()
    assert read_record(small).metrics["corpus.rows"] == len(read(small, "corpus"))


def test_rows_say_where_they_come_from_and_their_split_is_by_object(small: Path) -> None:
    for table in TABLES:
        rows = read(small, table)
        assert len({r["id"] for r in rows}) == len(rows) > 0
        for r in rows:
            assert r["split"] == split_of(r["object"])
            assert r["licence"] in ("PSF-2.0", "CC0-1.0")
            assert r["provenance"] and r["source"] in ("python-docs", "generated")
            assert r["lang"] in ("en", "es")


def test_a_wrong_answer_is_another_objects_of_the_same_split(small: Path) -> None:
    answers = {}  # text of the answer -> splits of the objects it belongs to
    for r in read(small, "instructions"):
        answers.setdefault(r["messages"][1]["content"], set()).add(r["split"])
    kinds: dict[str, Counter[str]] = {}
    for r in read(small, "preferences"):
        kinds.setdefault(r["split"], Counter())[r["kind"]] += 1
        assert r["chosen"] != r["rejected"]
        said = r["rejected"]["content"]
        if said and r["kind"] == "off-topic":
            assert r["split"] in answers[said]
        if r["kind"] == "cut" and said:
            assert r["chosen"]["content"].startswith(said)
            assert len(said) <= 0.66 * len(r["chosen"]["content"])
    for counted in kinds.values():
        assert max(counted.values()) - min(counted.values()) <= 0.1 * sum(counted.values())


def test_four_choices_hold_the_objects_own_description(small: Path) -> None:
    described = {
        r["messages"][1]["content"].partition(": ")[0]: r["messages"][1]["content"].partition(": ")[2]
        for r in read(small, "instructions")
        if r["id"].endswith("/describe/en")
    }
    rows = read(small, "eval")
    assert {r["split"] for r in rows} == {"val", "test"}
    for r in rows:
        name = r["id"].removeprefix("choice/")
        assert r["question"] == f"What does {name} do?"
        assert r["choices"][r["answer"]] == described[name]
        assert len(set(r["choices"])) == 4


def doc(name: str, summary: str, module: str = "m") -> Doc:
    return Doc(name, "function", module, f"{name}(a)", summary, summary, name)


def test_the_questions_of_one_object() -> None:
    asked = [q for seed in range(40) for q in questions.of_docs([doc("m.f", "Do a thing."), doc("n.g", "Rest.")], seed)]
    said = {(q.topic, q.lang, q.first["content"]) for q in asked if q.about == "m.f"}
    assert said == {
        ("describe", "en", "m.f: Do a thing."),
        ("describe", "es", "m.f: Do a thing."),
        ("signature", "en", "The signature is m.f(a)."),
        ("signature", "es", "La firma es m.f(a)."),
        ("module", "en", "m.f is defined in the module m."),
        ("module", "es", "m.f se define en el módulo m."),
    }
    assert {q.messages[0]["content"] for q in asked} >= {"What does m.f do?", "¿Qué hace m.f?"}


def test_a_package_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ForjaError, match="pip install nowhere_lib"):
        ingest(SMALL.model_copy(update={"package": "nowhere_lib"}), tmp_path / "data", silent)
    assert not (tmp_path / "data").exists()


def folder(tmp_path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    ingest(
        Config(source=str(tmp_path / "mine"), package=None, seed=0, problems=0, limit=None), tmp_path / "data", silent
    )
    return tmp_path / "data"


def test_bare_rows_of_a_folder_are_filled(tmp_path: Path) -> None:
    data = folder(
        tmp_path,
        {
            "corpus/a.txt": b"Hola.\r\n\r\nUn texto.",
            "corpus/long.txt": b"\n\n".join(b"paragraph %d " % i + b"x" * 2000 for i in range(12)),
            "instructions/i.jsonl": b'{"instruction": "Say hi", "response": "hi", "lang": "es"}\n',
            "preferences/p.jsonl": b'{"prompt": "Say hi", "chosen": "hi", "rejected": "no"}\n',
            "prompts/deep/q.jsonl": b'{"prompt": "Say hi"}\n',
        },
    )
    corpus = read(data, "corpus")
    assert corpus[0]["text"] == "Hola.\n\nUn texto."
    assert len(corpus) == 13  # the long file's paragraphs are 2 kB each, a piece holds one
    assert len({r["object"] for r in corpus}) == 13
    [row] = read(data, "instructions")
    assert row == {
        "id": "instructions/i.jsonl:1",
        "source": "instructions/i.jsonl",
        "licence": "unknown",
        "provenance": "instructions/i.jsonl, line 1",
        "lang": "es",
        "object": "Say hi",
        "split": split_of("Say hi"),
        "messages": [{"role": "user", "content": "Say hi"}, {"role": "assistant", "content": "hi"}],
    }
    [pair] = read(data, "preferences")
    assert pair["chosen"] == {"role": "assistant", "content": "hi"}
    assert pair["object"] == read(data, "prompts")[0]["object"] == "Say hi"


def test_lines_that_are_no_rows_are_passed_on_byte_for_byte(tmp_path: Path) -> None:
    lines = [b"{not json", b"\xff\xfe", b"", b'{"text": NaN}', b"[1]", b'{"text": "a", "text": "b"}']
    data = folder(tmp_path, {"corpus/c.jsonl": b"\n".join(lines)})
    assert (data / "corpus" / "c.jsonl").read_bytes() == b"\n".join(lines) + b"\n"


def test_a_folder_without_the_layout_is_told_which(tmp_path: Path) -> None:
    with pytest.raises(ForjaError, match=r"holds no data; it needs corpus/\*\.txt"):
        folder(tmp_path, {"notes.txt": b"text"})
    with pytest.raises(ForjaError, match="neither python-docs nor a folder"):
        ingest(SMALL.model_copy(update={"source": str(tmp_path / "none")}), tmp_path / "data", silent)

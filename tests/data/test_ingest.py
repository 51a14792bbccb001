"""Ingest: the five tables from Python's documentation, and from a folder."""

import json
import os
from collections import Counter
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from components.artifact import ForjaError, read_record
from components.data import questions
from components.data.ingest import TABLES, Config, ingest
from components.data.sources import Doc, split_of
from components.data.spread import HERE, Executor
from components.log import silent

OPEN = {"licences": None, "exclude_sources": [], "exclude_ids": None}
PYTHON = {"seed": 3, "package": None, "problems": 300, "limit": 900}
SMALL = Config.model_validate({"sources": [{"source": "python-docs"}], **OPEN, **PYTHON})


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
        if r["kind"] == "garbled" and said and r["object"] in said and len(said) > 60:
            assert SequenceMatcher(None, r["chosen"]["content"], said, autojunk=False).ratio() > 0.5
    for counted in kinds.values():
        assert set(counted) == {"wrong", "cut", "off-topic", "garbled"}
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


def folder(tmp_path: Path, files: dict[str, bytes], executor: Executor = HERE, **said: Any) -> Path:
    for name, content in files.items():
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    cfg = {"sources": [{"source": str(tmp_path / "mine"), **said}], **OPEN, **PYTHON}
    ingest(Config.model_validate(cfg), tmp_path / "data", silent, executor=executor)
    return tmp_path / "data"


def turned_away(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / "quarantine.jsonl").read_bytes().split(b"\n") if line]


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
    assert [r["line"] for r in corpus[:3]] == [
        "mine/corpus/a.txt:1",
        "mine/corpus/long.txt:1",
        "mine/corpus/long.txt:3",
    ]
    [row] = read(data, "instructions")
    assert row == {
        "id": "mine/instructions/i.jsonl:1",
        "source": "mine",
        "licence": "unknown",
        "provenance": "mine/instructions/i.jsonl, line 1",
        "lang": "es",
        "object": "Say hi",
        "split": split_of("Say hi"),
        "line": "mine/instructions/i.jsonl:1",
        "messages": [{"role": "user", "content": "Say hi"}, {"role": "assistant", "content": "hi"}],
    }
    [pair] = read(data, "preferences")
    assert pair["chosen"] == {"role": "assistant", "content": "hi"}
    assert pair["object"] == read(data, "prompts")[0]["object"] == "Say hi"


def test_every_line_is_a_row_or_in_quarantine_with_its_bytes_and_reason(tmp_path: Path) -> None:
    lines = [
        b"{not json",
        b"\xff\xfe",
        b"",
        b'{"text": NaN}',
        b"[1]",
        b'{"text": "a", "text": "b"}',
        b'{"text": "good"}',
    ]
    data = folder(tmp_path, {"corpus/c.jsonl": b"\n".join(lines)})
    assert [r["text"] for r in read(data, "corpus")] == ["good"]
    found = {r["line"]: (r["reason"], r["raw"]) for r in turned_away(data)}
    assert found == {
        1: ("not JSON: Expecting property name enclosed in double quotes at character 2", "{not json"),
        2: ("not UTF-8: byte 1 is 0xff", "\\xff\\xfe"),
        3: ("empty line", ""),
        4: ("not JSON: NaN is no JSON number", '{"text": NaN}'),
        5: ("not an object: a row is {...}, this is a list", "[1]"),
        6: ("duplicate key: 'text'", '{"text": "a", "text": "b"}'),
    }
    assert {(r["file"], r["source"]) for r in turned_away(data)} == {("mine/corpus/c.jsonl", "mine")}
    counts = read_record(data).metrics
    assert (counts["mine.read"], counts["mine.kept"], counts["mine.quarantined"]) == (7, 1, 6)


def test_files_of_one_source_may_number_their_rows_alike(tmp_path: Path) -> None:
    lines = b'{"id": 0, "text": "one of %s"}\n{"id": 1, "text": "two of %s"}\n'
    data = folder(tmp_path, {f"{name}.jsonl": lines.replace(b"%s", name.encode()) for name in ("a", "b")})
    assert [r["id"] for r in read(data, "corpus")] == [f"mine/{f}.jsonl/{i}" for f in "ab" for i in (0, 1)]


def test_what_is_not_there_or_holds_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ForjaError, match="mine: holds no data; files that end in"):
        folder(tmp_path, {"picture.png": b"text", "README.md": b"about", ".hidden.txt": b"x"})
    with pytest.raises(ForjaError, match="no such file or folder; give one, a glob, hf:org/name or python-docs"):
        none = {"sources": [{"source": str(tmp_path / "none")}], **OPEN, **PYTHON}
        ingest(Config.model_validate(none), tmp_path / "data", silent)


ROWS = b"".join(
    b'{"id": "r%d", "text": "Text number %d.", "licence": "%s", "source": "%s"}\n'
    % (i, i, b"MIT" if i % 2 else b"GPL-3.0", b"wiki" if i % 5 else b"crawl/x")
    for i in range(1000)
)


def mixed(tmp_path: Path, **said: Any) -> dict[str, list[dict[str, Any]]]:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(ROWS)
    sources = [{"source": str(tmp_path / "a.jsonl"), "weight": 3}, {"source": str(tmp_path / "b.jsonl"), "weight": 1.5}]
    cfg = Config.model_validate({"sources": sources, **OPEN, **PYTHON, **said})
    counts = ingest(cfg, tmp_path / "data", silent)
    for name in ("a.jsonl", "b.jsonl"):
        assert counts[f"{name}.read"] == counts[f"{name}.kept"] + counts[f"{name}.quarantined"] == 1000
    rows = read(tmp_path / "data", "corpus")
    return {x: [r for r in rows if r["line"].startswith(f"{x}.jsonl:")] for x in "ab"}


def test_a_weight_of_half_draws_half_and_the_same_half_again(tmp_path: Path) -> None:
    first = mixed(tmp_path)
    assert len(first["a"]) == 1000
    assert 440 < len(first["b"]) < 560  # 500 and four standard deviations
    assert mixed(tmp_path) == first
    away = turned_away(tmp_path / "data")
    assert len(away) == 1000 - len(first["b"])
    assert {(r["source"], r["reason"], r["raw"]) for r in away} == {("b.jsonl", "not drawn: the source's weight", "")}
    assert (
        first["a"][1]["licence"] == "MIT" and first["a"][1]["source"] == "wiki" and first["a"][1]["id"] == "a.jsonl/r1"
    )


def test_licences_sources_and_ids_are_left_out_and_their_text_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "out.txt").write_text("r7\na.jsonl/r9\n")
    said = {"licences": ["MIT"], "exclude_sources": ["crawl/*"], "exclude_ids": str(tmp_path / "out.txt")}
    kept = {r["id"] for r in mixed(tmp_path, **said)["a"]}
    assert kept == {f"a.jsonl/r{i}" for i in range(1000) if i % 2 and i % 5 and i not in (7, 9)}
    away = [r for r in turned_away(tmp_path / "data") if r["source"] == "a.jsonl"]
    assert Counter(r["reason"] for r in away) == {
        "licence: GPL-3.0 is none of those allowed": 500,
        "excluded: source crawl/x": 100,
        "excluded: its id opted out": 2,
    }
    assert all(r["raw"] == "" for r in away)


def test_several_processes_and_parts_give_the_bytes_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = b"".join(b'{"text": "%d %s"}\n' % (i, b"x" * (i % 700)) for i in range(5000)) + b"{broken\n"
    files = {"a.jsonl": rows, "b.jsonl": b'{"text": "last"}\n', "c.txt": b"One.\n\nTwo.\n" * 9000}
    whole = folder(tmp_path / "one", files)
    monkeypatch.setattr("components.data.ingest.TOGETHER", 1)
    again = folder(tmp_path / "two", files, HERE.model_copy(update={"workers": 2}))
    assert (again / "quarantine.jsonl").read_bytes() == (whole / "quarantine.jsonl").read_bytes()
    told = [json.loads((data / "sources.json").read_bytes()) for data in (again, whole)]
    assert [said.pop("from") for [said] in told] == [str(tmp_path / name / "mine") for name in ("two", "one")]
    assert told[0] == told[1] and told[0][0]["licences"] == {"unknown": sum(told[0][0]["splits"].values())}
    assert [p.name for p in sorted((again / "corpus" / "mine").iterdir())] == [f"0000{i}.jsonl" for i in range(3)]
    assert read(again, "corpus") == read(whole, "corpus")
    monkeypatch.setattr("components.data.convert.BLOCK", 100_000)
    parts = folder(tmp_path / "three", files)
    lines = [r["line"] for r in read(parts, "corpus") if "a.jsonl" in r["line"]]
    assert lines == [f"mine/a.jsonl:{i}" for i in range(1, 5001)]
    assert turned_away(parts) == turned_away(whole)
    said = "".join(r["text"] for r in read(parts, "corpus") if "c.txt" in r["line"])
    assert said == "One.\n\nTwo.\n" * 9000


def test_splits_are_the_rows_own_the_files_the_recipes_or_the_hashs(tmp_path: Path) -> None:
    pair, choice = b'{"question": "%s", "answer": "a"}\n', b'{"question": "%s", "choices": ["a", "b"], "answer": 0}\n'
    own = b'{"question": "own%d", "answer": "a", "split": "validation"}\n'
    files = {
        "train.jsonl": b"".join(pair % b"t%d" % i for i in range(200)) + b"".join(own % i for i in range(9)),
        "held_test.jsonl": b"".join(pair % b"h%d" % i for i in range(20)),
        "dev/x.jsonl": b"".join(pair % b"d%d" % i for i in range(20)),
        "contest.jsonl": b"".join(pair % b"c%d" % i for i in range(200)),
        "eval/q.jsonl": b"".join(choice % b"q%d" % i for i in range(200)),
    }

    def splits(name: str, **said: Any) -> dict[str, Counter[str]]:
        data = folder(tmp_path / name, files, **said)
        found: dict[str, Counter[str]] = {}
        for row in read(data, "instructions") + read(data, "eval"):
            file = "own" if row["object"].startswith("own") else row["line"].split("/", 1)[1].partition(":")[0]
            found.setdefault(file, Counter())[row["split"]] += 1
        return found

    auto = splits("auto")
    assert auto["own"] == {"val": 9} and auto["held_test.jsonl"] == {"test": 20} and auto["dev/x.jsonl"] == {"val": 20}
    by_hash = Counter(split_of(f"t{i}") for i in range(200))
    assert auto["train.jsonl"] == by_hash and set(by_hash) == {"train", "val", "test"}
    assert auto["contest.jsonl"] == Counter(split_of(f"c{i}") for i in range(200))
    assert "train" not in auto["eval/q.jsonl"] and auto["eval/q.jsonl"].total() == 200
    cut = splits("hash", split="hash")
    assert cut["held_test.jsonl"] == Counter(split_of(f"h{i}") for i in range(20)) and cut["own"] != {"val": 9}
    assert all(set(found) == {"val"} for found in splits("val", split="val").values())


def test_names_that_are_no_utf8_or_hold_brackets(tmp_path: Path) -> None:
    names = [b"\xff.jsonl", "ñ [b] \n.jsonl".encode(), b"a b.jsonl"]
    (tmp_path / "mine").mkdir()
    for name in names:
        with open(os.fsencode(tmp_path / "mine") + b"/" + name, "wb") as f:
            f.write(b'{"text": "t"}\n{broken\n')
    data = folder(tmp_path, {})
    wanted = ["mine/a b.jsonl", "mine/ñ [b] \n.jsonl", "mine/\\udcff.jsonl"]
    assert [r["line"] for r in read(data, "corpus")] == [f"{name}:1" for name in wanted]
    assert [r["file"] for r in turned_away(data)] == wanted


def test_problems_are_a_source_of_their_own_in_one_language(tmp_path: Path) -> None:
    cfg = {**OPEN, **PYTHON, "sources": [{"source": "problems", "lang": "es"}], "problems": 60}
    ingest(Config.model_validate(cfg), tmp_path / "out", silent)
    for table in ("instructions", "preferences", "prompts"):
        rows = read(tmp_path / "out", table)
        assert len(rows) > 15 and {row["lang"] for row in rows} == {"es"}
        assert {row["source"] for row in rows} == {"generated"}
    assert not read(tmp_path / "out", "corpus")
    with pytest.raises(ValidationError, match="one of auto, en, es is wanted"):
        Config.model_validate(cfg | {"sources": [{"source": "problems", "lang": "fr"}]})
    both = Config.model_validate(cfg | {"sources": [{"source": "problems", "lang": "auto"}]})
    ingest(both, tmp_path / "both", silent)
    assert {row["lang"] for row in read(tmp_path / "both", "prompts")} == {"en", "es"}


def test_a_files_language_is_told_by_its_first_records(tmp_path: Path) -> None:
    spanish = b'{"instruction": "Explica en una frase corta por que llueve.", "output": "Porque el vapor se enfria."}\n'
    english = b'{"instruction": "Explain in one short sentence why it rains.", "output": "Because vapour cools."}\n'
    files = {
        "a.jsonl": spanish * 9 + english,
        "b.jsonl": english * 9 + spanish,
        "c.jsonl": spanish.replace(b"{", b'{"lang": "en", ', 1),
        "d.jsonl": spanish.replace(b"{", b'{"language": "Spanish", ', 1) + english * 3,
        "e.txt": b"7 + 5 = 12\n",
    }
    found: dict[str, set[str]] = {}
    data = folder(tmp_path / "told", files)
    for row in read(data, "instructions") + read(data, "corpus"):
        found.setdefault(row["line"][5], set()).add(row["lang"])
    assert found == {"a": {"es"}, "b": {"en"}, "c": {"en"}, "d": {"es", "en"}, "e": {"en"}}
    data = folder(tmp_path / "said", files, lang="es")
    assert {r["lang"] for r in read(data, "instructions") if "/c.jsonl" not in r["line"]} == {"es"}
    assert {r["lang"] for r in read(data, "instructions") if "/c.jsonl" in r["line"]} == {"en"}
    data = folder(tmp_path / "each", files, lang="auto")
    by_row = {(r["line"], r["lang"]) for r in read(data, "instructions") + read(data, "corpus")}
    wanted = {(f"mine/a.jsonl:{i}", "en" if i == 10 else "es") for i in range(1, 11)}
    wanted |= {(f"mine/b.jsonl:{i}", "es" if i == 10 else "en") for i in range(1, 11)}
    wanted |= {("mine/c.jsonl:1", "en"), ("mine/d.jsonl:1", "es"), ("mine/e.txt:1", "en")}
    assert by_row == wanted | {(f"mine/d.jsonl:{i}", "en") for i in (2, 3, 4)}


def test_in_each_table_a_rows_texts_tell_its_language(tmp_path: Path) -> None:
    """A row in English, one in Spanish, and one too short to tell, which counts as its file's."""
    texts = ["The weather was fine and we walked along the river.", "Hacía buen tiempo y paseamos por el río.", "7 + 5"]
    asked = ["Which of these animals lays eggs?", "¿Cuál de estos animales pone huevos?", "7?"]
    made = {
        "c.jsonl": [{"text": text} for text in texts],
        "e.jsonl": [{"question": question, "choices": ["1", "2"], "answer": 0} for question in asked],
        "p.jsonl": [{"prompt": q, "chosen": a, "rejected": "?"} for q, a in zip(asked, texts, strict=True)],
        "q.jsonl": [{"prompt": question} for question in asked],
    }
    files = {name: b"".join(json.dumps(row).encode() + b"\n" for row in rows) for name, rows in made.items()}
    data = folder(tmp_path, files, lang="auto")
    for table in ("corpus", "eval", "preferences", "prompts"):
        assert [row["lang"] for row in read(data, table)] == ["en", "es", "en"], table

"""Validate: planted faults are rejected with file, line and reason; the counts are made by hand."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from components.artifact import ForjaError
from components.data import jsonlines
from components.data.rules import Limits, Unfit, check, parse
from components.data.spread import HERE, each
from components.data.validate import Config, run
from components.log import silent

LIMITS = Limits(min_chars=5, max_chars=1000, max_rejected_share=0.9, max_duplicate_share=None, max_class_share=0.8)
TABLES = ("corpus", "instructions", "preferences", "prompts", "eval")
LEAK = "Serialize an object to a text that others can read"


def config(share: float = 0.9, **more: Any) -> Config:
    limits = LIMITS.model_dump() | {"max_rejected_share": share}
    asked = {"ngram": 13, "whole": 8, "decontaminate": [], "near_duplicates": None, "languages": None}
    asked |= {"quality": [], "pii": "off", "poison": "off"} | more
    return Config.model_validate(asked | {"tables": dict.fromkeys(TABLES, limits)})


def test_a_bare_off_which_yaml_reads_as_false_is_off() -> None:
    assert config(pii=False, poison=False) == config(pii="off", poison="off")


def row(name: str, split: str = "train", **fields: Any) -> dict[str, Any]:
    common = {"id": name, "source": "s", "licence": "l", "provenance": "p", "lang": "en", "object": name}
    return common | {"split": split} | fields


def says(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


ASKED = [says("user", "What is that?")]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "calculate", "arguments": {"expression": "1"}}]}
CORPUS = [
    line(row("a", text="A good document.")),
    b'{"id": "broken',
    b"",
    b'{"id": "\xff"}',
    line(row("b", text="A  GOOD document.", split="test")),  # the copy in test stays, a goes
    line(row("c", text="It holds a\u2028line separator.")),
    line(row("d", text=f"dump: {LEAK}.")),
    line(row("a2", text="NaN", n=1)).replace(b'"n": 1', b'"n": NaN'),
    line(row("e", text="Twice.")).replace(b"{", b'{"text": "first", ', 1),
    line(row("f", text="a NUL \0 here")),
    line(row("b", text="Another with the id of b.")),
    line(row("g", text="tiny")),
    line(row("h", text="Damaged \ufffd text.")),
    line({k: v for k, v in row("i", text="No licence.").items() if k != "licence"}),
    line(row("j", text="Wrong split.", split="dev")),
    b"[1, 2]",
    line(row("k", text=7)),
    b'{"id": "\\ud800"}',
]
REASONS = {
    1: "duplicate: of b",
    2: "not JSON: Unterminated string starting at at character 8",
    3: "empty line",
    4: "not UTF-8: byte 9 is 0xff",
    7: f'contaminated: holds "{LEAK.lower()}" of q',
    8: "not JSON: NaN is no JSON number",
    9: "duplicate key: 'text'",
    10: "damaged text: NUL",
    11: "id used twice: also at corpus/c.jsonl:5",
    12: "too short: 4 characters, at least 5",
    13: "damaged text: U+FFFD stands where bytes were lost",
    14: "missing field: licence",
    15: "split: 'dev' is none of train, val, test",
    16: "not an object: a row is {...}, this is a list",
    17: "wrong type: text is no text",
    18: "damaged text: half of a surrogate pair",
}
OTHERS = {
    "instructions": [
        line(row("i1", messages=[*ASKED, says("assistant", "It is this.")])),
        line(row("i2", messages=[*ASKED, CALL, says("tool", "1"), says("assistant", "It is 1.")])),
    ],
    "preferences": [
        line(row("p1", messages=ASKED, chosen=says("assistant", "yes"), rejected=CALL, kind="wrong")),
        line(row("p2", messages=ASKED, chosen=says("assistant", "y"), rejected=says("assistant", " y"), kind="cut")),
    ],
    "prompts": [line(row("r1", messages=ASKED))],
    "eval": [line(row("q", "test", question="What does dump do?", choices=["w", LEAK, "x", "y"], answer=1))],
}


def write(data: Path, tables: dict[str, list[bytes]]) -> Path:
    for table, lines in tables.items():
        (data / table).mkdir(parents=True)
        (data / table / "c.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return data


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    root = tmp_path_factory.mktemp("validate")
    out = root / "out"
    out.mkdir()
    return out, run(config(), write(root / "data", {"corpus": CORPUS, **OTHERS}), out, silent)


def test_every_planted_fault_is_rejected_with_its_place_and_reason(validated: tuple[Path, dict[str, float]]) -> None:
    out, _ = validated
    rejected = [json.loads(x) for x in (out / "rejected.jsonl").read_text(encoding="utf-8").split("\n") if x]
    assert {r["line"]: r["reason"] for r in rejected if r["table"] == "corpus"} == REASONS
    assert {r["file"] for r in rejected if r["table"] == "corpus"} == {"corpus/c.jsonl"}
    others = [(r["table"], r["line"], r["reason"]) for r in rejected if r["table"] != "corpus"]
    assert others == [("preferences", 2, "no preference: chosen and rejected are the same")]
    assert next(r["row"] for r in rejected if r["line"] == 4) == '{"id": "\\xff"}'


def test_kept_rows_keep_their_bytes(validated: tuple[Path, dict[str, float]]) -> None:
    out, _ = validated
    assert (out / "corpus.jsonl").read_bytes() == CORPUS[4] + b"\n" + CORPUS[5] + b"\n"
    assert (out / "eval.jsonl").read_bytes() == OTHERS["eval"][0] + b"\n"


def test_kept_and_rejected_make_the_read(validated: tuple[Path, dict[str, float]]) -> None:
    out, metrics = validated
    funnel = json.loads((out / "funnel.json").read_text())
    for table, counts in funnel.items():
        assert counts["read"] == counts["kept"] + sum(counts["rejected"].values())
        assert metrics[f"{table}.read"] == counts["read"]
        assert metrics[f"{table}.rejected"] == counts["read"] - counts["kept"]
    assert (funnel["corpus"]["read"], funnel["corpus"]["kept"]) == (18, 2)
    assert funnel["corpus"]["splits"] == {"test": 1, "train": 1}
    assert (metrics["contaminated"], metrics["duplicates"]) == (1, 1)


def test_expectations_and_their_page(validated: tuple[Path, dict[str, float]]) -> None:
    out, metrics = validated
    found = json.loads((out / "expectations.json").read_text())
    assert sum(len(results) for results in found.values()) == metrics["expectations"] > 50
    assert all(r["success"] for results in found.values() for r in results)
    broken = found["corpus"][0]
    assert (broken["column"], broken["rows"], broken["unexpected"]) == ("broken_rule", 18, 14)
    page = (out / "docs" / "index.html").read_text(encoding="utf-8")
    assert "http" not in page.replace("http-equiv", "")
    assert "corpus/c.jsonl, line 14: missing field: licence" in page
    assert "{&#34;id&#34;: &#34;broken" in page  # a row is text on the page, never markup


def fails(tmp_path: Path, tables: dict[str, list[bytes]], share: float = 0.9) -> str:
    (tmp_path / "out").mkdir()
    with pytest.raises(ForjaError) as e:
        run(config(share), write(tmp_path / "data", tables), tmp_path / "out", silent)
    return str(e.value)


def test_too_many_broken_rows_stop_the_stage(tmp_path: Path) -> None:
    message = fails(tmp_path, {"corpus": CORPUS, **OTHERS}, share=0.1)
    assert message.startswith("corpus: expect_column_values_to_be_null fails on broken_rule: 14 of 18 rows")
    assert "corpus/c.jsonl:2 not JSON" in message
    assert "validate.tables.corpus" in message


def test_too_many_copies_stop_the_stage_and_are_named(tmp_path: Path) -> None:
    """Of ten rows three are copies: two of one, and one that differs in case."""
    texts = [f"Text number {i} of ten." for i in range(7)] + ["Text number 0 of ten."] * 2 + ["TEXT number 1 of ten."]
    data = write(tmp_path / "data", {"corpus": [line(row(f"c{i}", text=t)) for i, t in enumerate(texts)]})
    said: dict[float | None, Any] = {}
    for share in (0.3, 0.29, None):
        (out := tmp_path / f"out-{share}").mkdir()
        asked = config().model_dump()
        asked["tables"] = dict.fromkeys(TABLES, LIMITS.model_dump() | {"max_duplicate_share": share})
        try:
            said[share] = run(Config.model_validate(asked), data, out, silent)["duplicates"]
        except ForjaError as e:
            said[share] = str(e)
    assert said[0.3] == said[None] == 3
    assert said[0.29].startswith("corpus: expect_column_values_to_be_null fails on copy_of: 3 of 10 rows, such as ")
    assert "corpus/c.jsonl:8 duplicate: of c0" in said[0.29] and "validate.tables.corpus" in said[0.29]


def test_an_object_in_two_splits_stops_the_stage(tmp_path: Path) -> None:
    torn = [line(row("x", text="First text.", object="o")), line(row("y", "test", text="Second text.", object="o"))]
    assert "fails on splits_of_object: 2 of 2 rows" in fails(tmp_path, {"corpus": torn})


def test_an_empty_corpus_stops_the_stage(tmp_path: Path) -> None:
    assert "expect_table_row_count_to_be_between" in fails(tmp_path, OTHERS)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([says("assistant", "hello")], "roles: message 1 is the assistant's, expected the user's"),
        ([*ASKED, *ASKED], "roles: message 2 is the user's, expected the assistant's"),
        ([*ASKED, CALL, says("assistant", "x")], "roles: message 3 is the assistant's, expected the tool's"),
        ([*ASKED, says("tool", "1")], "roles: message 2 is the tool's, expected the assistant's"),
        ([*ASKED, CALL], "roles: an instruction ends with the assistant's answer"),
        ([*ASKED, says("assistant", " ")], "empty field: message 2 says nothing"),
        ([*ASKED, {"role": "assistant", "content": None}], "wrong type: message 2 has no content text"),
        ([*ASKED, CALL | {"tool_calls": []}], "tool calls: message 2 is no assistant's list of calls"),
        ([*ASKED, CALL | {"tool_calls": [{}]}], "tool calls: message 2 has a call without name or arguments"),
        ([{"role": "system", "content": "x"}], "roles: message 1 has no role user, assistant or tool"),
        ("text", "missing field: messages"),
    ],
)
def test_dialogues(messages: Any, reason: str) -> None:
    with pytest.raises(Unfit) as e:
        check("instructions", row("i", messages=messages), LIMITS)
    assert str(e.value) == reason


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"choices": ["a"]}, "choices: 2 to 26 texts are needed"),
        ({"choices": ["a", "b", "c", "A "]}, "choices: two of them are the same"),
        ({"answer": 4}, "answer: 4 is no index from 0 to 3"),
        ({"answer": True}, "answer: True is no index from 0 to 3"),
    ],
)
def test_choices(fields: dict[str, Any], reason: str) -> None:
    good = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 0}
    check("eval", row("q", **good), LIMITS)
    with pytest.raises(Unfit) as e:
        check("eval", row("q", **(good | fields)), LIMITS)
    assert str(e.value) == reason


@pytest.mark.parametrize("text", [b'{"a": 1e999}', b'{"a": -Infinity}', b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_lenient_numbers_and_depths_are_refused(text: bytes) -> None:
    with pytest.raises(Unfit, match="not JSON"):
        parse(text)


def test_an_escaped_backslash_is_no_nul() -> None:
    assert parse(rb'{"a": "\\u0000"}') == {"a": "\\u0000"}


def test_neither_workers_nor_shards_change_a_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["ana", "lake", "wrote", "house", "summer", "ana@example.org", "keys", "of", "the", "to", "by", "and"]
    rng = random.Random(3)
    long = [" ".join(rng.choices(words, k=40)) for _ in range(60)]
    corpus = [line(row(f"w{i}", rng.choice(["train", "test"]), text=long[rng.randrange(50)])) for i in range(120)]
    data = write(tmp_path / "data", {"corpus": CORPUS + corpus, **OTHERS})
    asked = config(near_duplicates=0.7, languages=["en"], pii="redact", poison="drop")
    made = []
    for size, workers in ((jsonlines.SIZE, None), (12_000, 2)):
        monkeypatch.setattr(jsonlines, "SIZE", size)
        (out := tmp_path / f"out-{size}").mkdir()
        metrics = run(asked, data, out, silent, HERE.model_copy(update={"workers": workers}))
        made.append((metrics, {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()}))
    assert made[0] == made[1]


def test_a_worker_that_fails_says_where(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        list(each(_reads, [tmp_path / "gone.jsonl"] * 3, HERE.model_copy(update={"workers": 2}), 0, tmp_path))


def _reads(path: Path) -> None:
    path.read_bytes()


def manifest(data: Path, read: int, rows: int) -> None:
    away = {"file": "a.txt", "line": 3, "reason": "not UTF-8: byte 1", "raw": "x", "source": "a"}
    (data / "quarantine.jsonl").write_bytes(line(away) + b"\n")
    told = {
        "source": "a",
        "read": read,
        "kept": read - 1,
        "quarantined": 1,
        "rows": [{"table": "corpus", "rows": rows}],
    }
    (data / "sources.json").write_bytes(line([told]))


def test_what_ingest_read_is_what_it_kept_and_turned_away(tmp_path: Path) -> None:
    data = write(tmp_path / "data", {"corpus": CORPUS[4:7]})
    manifest(data, 4, 3)
    (out := tmp_path / "out").mkdir()
    run(config(), data, out, silent)
    counted = json.loads((out / "sources.json").read_text(encoding="utf-8"))
    assert counted == {"a": {"read": 4, "kept": 3, "quarantined": 1, "reasons": {"not UTF-8": 1}}}


@pytest.mark.parametrize(
    ("read", "rows", "said"), [(4, 2, "2 rows of corpus, but 3 lines"), (4, 3, "but 0 in quarantine")]
)
def test_a_snapshot_that_lost_rows_is_refused(tmp_path: Path, read: int, rows: int, said: str) -> None:
    data = write(tmp_path / "data", {"corpus": CORPUS[4:7]})
    manifest(data, read, rows)
    if "quarantine" in said:
        (data / "quarantine.jsonl").unlink()
    (tmp_path / "out").mkdir()
    with pytest.raises(ForjaError, match=said):
        run(config(), data, tmp_path / "out", silent)


LAST = "A quiet harbour town wakes slowly while the first boats return with their nets and the gulls follow them home"


def test_what_the_recipe_asks_for(tmp_path: Path) -> None:
    """Near-duplicates, another language, personal data, a named eval set, and what ingest turned away."""
    named = tmp_path / "named.jsonl"
    named.write_bytes(
        line({"question": "Which planet has the largest ring?", "choices": ["Mars", "Saturn"], "answer": 1})
    )
    corpus = [
        line(row("n1", text=f"{LAST} again.")),
        line(row("n2", "test", text=f"{LAST}, again and again.")),
        line(row("f", text="Le chat noir dort tous les jours sur la chaise de la cuisine de ma grand-mère.")),
        line(row("m", text="Write to ana@example.org, she keeps the keys of the house by the lake.")),
        line(row("q", text="He asked: WHICH planet, has   the largest ring? Nobody knew.")),
    ]
    data = write(tmp_path / "data", {"corpus": corpus, **OTHERS})
    turned = {"file": "a.txt", "line": 3, "reason": "not UTF-8: byte 1 of line 3 is 0xff", "raw": "x", "source": "a"}
    (data / "quarantine.jsonl").write_bytes(line(turned) + b"\n")
    out = tmp_path / "out"
    out.mkdir()
    asked = {"near_duplicates": 0.7, "languages": ["en", "es"], "pii": "redact", "poison": "drop"}
    metrics = run(config(decontaminate=[str(named)], **asked), data, out, silent)
    rejected = [json.loads(x) for x in (out / "rejected.jsonl").read_text(encoding="utf-8").split("\n") if x]
    reasons = {(r["table"], r["line"]): r["reason"] for r in rejected if r["table"] in ("corpus", "unread")}
    assert reasons == {
        ("corpus", 1): "near-duplicate: of n2",
        ("corpus", 3): "language: fr, wanted en, es",
        ("corpus", 5): f'contaminated: holds "which planet has the largest ring" of {named}:1',
        ("unread", 3): turned["reason"],
    }
    kept = (out / "corpus.jsonl").read_bytes().split(b"\n")
    assert kept[0] == corpus[1] and json.loads(kept[1])["text"].startswith("Write to [EMAIL], she")
    assert (metrics["pii.flagged"], metrics["unread"]) == (1, 1)


def test_a_class_that_is_nearly_all_fails_and_says_which_rows(tmp_path: Path) -> None:
    """45 of 50 right answers stand first; of the 20 questions with two choices all do, too few to tell."""
    four = [
        row(
            f"q{i}", "test", question=f"Which of these is number {i}?", choices=["a", "b", "c", f"d{i}"], answer=i // 45
        )
        for i in range(50)
    ]
    two = [row(f"t{i}", "test", question=f"Is it {i}?", choices=["yes", f"no {i}"], answer=0) for i in range(20)]
    (tmp_path / "data" / "eval").mkdir(parents=True)
    (tmp_path / "data" / "eval" / "x.jsonl").write_bytes(b"".join(line(r) + b"\n" for r in [*four, *two]))
    for table in TABLES[:-1]:
        (tmp_path / "data" / table).mkdir()
    (tmp_path / "data" / "corpus" / "x.jsonl").write_bytes(line(row("c", text="A text of its own.")) + b"\n")
    (tmp_path / "out").mkdir()
    with pytest.raises(
        ForjaError, match=r"eval: .* fails on class_share: 45 of 70 rows, such as 0.9 in q0; .*tables.eval"
    ):
        run(config(), tmp_path / "data", tmp_path / "out", silent)

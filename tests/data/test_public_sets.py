"""Public sets through ingest, with no word about their shapes; the truths are counted here by plain loops."""

import csv
import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from public import PUBLIC, needs_public

from components.artifact import read_record
from components.data.ingest import Config, ingest
from components.log import silent

pytestmark = needs_public
REST = {"licences": None, "exclude_sources": [], "exclude_ids": None}
REST |= {"seed": 0, "package": None, "problems": 0, "limit": None}
TABLES = ("corpus", "instructions", "preferences", "prompts", "eval")
Rows = dict[str, list[dict[str, Any]]]


def take(tmp_path: Path, source: Path, **said: Any) -> tuple[Rows, list[dict[str, Any]], dict[str, Any]]:
    """(rows by table, quarantine, what sources.json says) of one source, whose counts reconcile."""
    out = tmp_path / "data"
    cfg = Config.model_validate({"sources": [{"source": str(source), **said}], **REST})
    ingest(cfg, out, silent)
    rows = {t: [json.loads(x) for p in (out / t).glob("*.jsonl") for x in p.open("rb")] for t in TABLES}
    away = [json.loads(x) for x in (out / "quarantine.jsonl").open("rb")]
    [told] = json.loads((out / "sources.json").read_bytes())
    counts = read_record(out).metrics
    label = told["source"]
    assert counts[f"{label}.read"] == counts[f"{label}.kept"] + counts[f"{label}.quarantined"] == told["read"]
    assert counts[f"{label}.quarantined"] == len(away)
    for table, found in rows.items():
        assert counts[f"{table}.rows"] == len(found)
        assert len({r["id"] for r in found}) == len(found)
        for r in found:
            assert {"id", "source", "licence", "provenance", "lang", "object", "split", "line"} <= r.keys()
    return rows, away, told


def shapes(told: dict[str, Any]) -> dict[tuple[str, str], int]:
    return {(r["shape"], r["table"]): r["rows"] for r in told["rows"]}


def said(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in row["messages"]]


def jsonl(path: Path) -> list[Any]:
    return [json.loads(x) for x in path.read_bytes().split(b"\n") if x]


def test_gsm8k_is_pairs_and_its_test_file_is_held_out(tmp_path: Path) -> None:
    rows, away, told = take(tmp_path, PUBLIC / "gsm8k")
    truth = {name: jsonl(PUBLIC / "gsm8k" / f"{name}.jsonl") for name in ("test", "train")}
    assert shapes(told) == {("pairs", "instructions"): 7473 + 1319} and not away
    found = {name: [r for r in rows["instructions"] if f"/{name}.jsonl:" in r["line"]] for name in truth}
    for name, wanted in truth.items():
        assert [said(r) for r in found[name]] == [[("user", w["question"]), ("assistant", w["answer"])] for w in wanted]
    assert {r["split"] for r in found["test"]} == {"test"}
    assert {r["split"] for r in found["train"]} == {"train", "val", "test"}


def test_alpaca(tmp_path: Path) -> None:
    rows, away, told = take(tmp_path, PUBLIC / "llamafactory_demo" / "alpaca_en_demo.json")
    truth = json.loads((PUBLIC / "llamafactory_demo" / "alpaca_en_demo.json").read_bytes())
    assert shapes(told) == {("alpaca", "instructions"): 999} and not away
    for r, w in zip(rows["instructions"], truth, strict=True):
        asked = w["instruction"] + ("\n\n" + w["input"] if w["input"] else "")
        assert said(r) == [("user", asked), ("assistant", w["output"])]


def test_seed_tasks_become_a_row_for_each_instance(tmp_path: Path) -> None:
    rows, away, told = take(tmp_path, PUBLIC / "stanford_alpaca" / "seed_tasks.jsonl")
    truth = jsonl(PUBLIC / "stanford_alpaca" / "seed_tasks.jsonl")
    assert told["read"] == told["kept"] == 175 and not away
    assert len(rows["instructions"]) == sum(len(w["instances"]) for w in truth)
    assert [said(r)[-1][1] for r in rows["instructions"]] == [i["output"] for w in truth for i in w["instances"]]


def test_hh_rlhf_dialogues(tmp_path: Path) -> None:
    rows, away, told = take(tmp_path, PUBLIC / "hh_rlhf", split="hash")
    with gzip.open(PUBLIC / "hh_rlhf" / "harmless-base_test.jsonl.gz") as f:
        truth = [json.loads(x) for x in f]
    good, torn = [], []
    for number, w in enumerate(truth, start=1):
        at = [w[key].rfind("\n\nAssistant:") for key in ("chosen", "rejected")]
        same = at[0] == at[1] and w["chosen"][: at[0]] == w["rejected"][: at[0]]
        (good if same else torn).append((number, at[0], w))
    assert (len(good), len(torn)) == (2307, 5)  # counted by hand beforehand
    assert shapes(told) == {("preference-dialogue", "preferences"): 2307}
    assert [r["line"] for r in away] == [number for number, _, _ in torn]
    assert {r["reason"] for r in away} == {"dialogue: chosen and rejected part before their last turn"}
    for r, (_, _, w) in zip(rows["preferences"], good, strict=True):
        mark = {"user": "\n\nHuman:", "assistant": "\n\nAssistant:"}
        for key in ("chosen", "rejected"):  # nothing of the dialogue is lost but the one space after each colon
            turns = [*r["messages"], r[key]]
            assert "".join(mark[m["role"]] + m["content"] for m in turns) == re.sub(
                r"(\n\n(?:Human|Assistant):) ", r"\1", w[key]
            )


def test_dpo_in_turns_and_kto_labels(tmp_path: Path) -> None:
    rows, away, told = take(tmp_path, PUBLIC / "llamafactory_demo" / "dpo_en_demo.json")
    truth = json.loads((PUBLIC / "llamafactory_demo" / "dpo_en_demo.json").read_bytes())
    assert shapes(told) == {("preference-turns", "preferences"): 300} and not away
    system = 0
    for r, w in zip(rows["preferences"], truth, strict=True):
        assert (r["chosen"]["content"], r["rejected"]["content"]) == (w["chosen"]["value"], w["rejected"]["value"])
        turns = [t for t in w["conversations"] if t["from"] != "system"]
        system += len(w["conversations"]) - len(turns)
        assert [m["content"] for m in r["messages"]][1:] == [t["value"] for t in turns][1:]
        assert r["messages"][0]["content"].endswith(turns[0]["value"])
    rows, away, told = take(tmp_path, PUBLIC / "llamafactory_demo" / "kto_en_demo.json")
    truth = json.loads((PUBLIC / "llamafactory_demo" / "kto_en_demo.json").read_bytes())
    liked = [w for w in truth if w["label"]]
    assert shapes(told) == {("kto", "preferences"): 300} and not away and 0 < len(liked) < 300
    for r, w in zip(rows["preferences"], truth, strict=True):
        answer, other = ("chosen", "rejected") if w["label"] else ("rejected", "chosen")
        assert [*said(r), (r[answer]["role"], r[answer]["content"])] == [
            (m["role"], m["content"]) for m in w["messages"]
        ]
        assert other not in r and r["kind"] == "judged"


def test_tool_chats(tmp_path: Path) -> None:
    rows, away, told = take(tmp_path, PUBLIC / "llamafactory_demo" / "glaive_toolcall_en_demo.json")
    truth = json.loads((PUBLIC / "llamafactory_demo" / "glaive_toolcall_en_demo.json").read_bytes())
    assert shapes(told) == {("tool-chat", "instructions"): 300} and not away
    calls = [json.loads(t["value"]) for w in truth for t in w["conversations"] if t["from"] == "function_call"]
    found = [c for r in rows["instructions"] for m in r["messages"] for c in m.get("tool_calls", ())]
    assert found == [{"name": c["name"], "arguments": c["arguments"]} for c in calls] and len(calls) > 100
    results = [t["value"] for w in truth for t in w["conversations"] if t["from"] == "observation"]
    assert [m["content"] for r in rows["instructions"] for m in r["messages"] if m["role"] == "tool"] == results
    rows, away, told = take(tmp_path, PUBLIC / "llamafactory_demo" / "reason_tool_use_demo_50.jsonl")
    lines = jsonl(PUBLIC / "llamafactory_demo" / "reason_tool_use_demo_50.jsonl")
    parts = Counter(p["type"] for w in lines for m in w["messages"] for p in m["content"])
    assert told["read"] == told["kept"] == 50 and not away
    messages = [m for r in rows["instructions"] for m in r["messages"]]
    assert sum(len(m.get("tool_calls", ())) for m in messages) == parts["tool_call"]
    assert sum("reasoning" in m for m in messages) == parts["reasoning"]


def test_mmlu_csv_with_dev_held_for_validation(tmp_path: Path) -> None:
    rows, away, _ = take(tmp_path, PUBLIC / "mmlu")
    truth: dict[str, list[list[str]]] = {}
    for path in sorted((PUBLIC / "mmlu").rglob("*.csv")):
        with path.open(newline="", encoding="utf-8") as f:
            truth[path.parent.name] = truth.get(path.parent.name, []) + list(csv.reader(f))[1:]
    assert not away and len(rows["eval"]) == sum(map(len, truth.values()))
    for name, split in (("dev", "val"), ("test", "test")):
        found = [r for r in rows["eval"] if r["line"].startswith(f"mmlu/{name}/")]
        assert [[r["question"], *r["choices"], str(r["answer"])] for r in found] == truth[name]
        assert {r["split"] for r in found} == {split}


def test_truthfulqa_arc_piqa_and_winogrande(tmp_path: Path) -> None:
    rows, away, told = take(tmp_path, PUBLIC / "truthfulqa")
    with (PUBLIC / "truthfulqa" / "TruthfulQA.csv").open(newline="", encoding="utf-8") as f:
        truth = list(csv.DictReader(f))
    assert shapes(told) == {("truthfulqa", "eval"): 817} and not away and len(truth) == 817
    for r, w in zip(rows["eval"], truth, strict=True):
        wrong = [x.strip() for x in w["Incorrect Answers"].split(";") if x.strip()]
        assert r["choices"][r["answer"]] == w["Best Answer"]
        assert r["choices"][: r["answer"]] + r["choices"][r["answer"] + 1 :] == wrong
    rows, away, told = take(tmp_path, PUBLIC / "eval")
    files = {p.name: jsonl(p) for p in sorted((PUBLIC / "eval").glob("*.jsonl"))}
    assert not away and told["read"] == sum(map(len, files.values()))
    for name in ("world_knowledge_arc_easy.jsonl", "commonsense_reasoning_piqa.jsonl", "hellaswag_small.jsonl"):
        found = [r for r in rows["eval"] if f"/{name}:" in r["line"]]
        wanted = [(w["query"], w["choices"], w["gold"]) for w in files[name]]
        assert [(r["question"], r["choices"], r["answer"]) for r in found] == wanted
    found = [r for r in rows["eval"] if "winogrande" in r["line"]]
    for r, w in zip(found, files["language_understanding_winogrande.jsonl"], strict=True):
        wanted = [f"{o} {w['continuation']}" for o in w["context_options"]]
        assert [r["question"] + c for c in r["choices"]] == wanted and r["answer"] == w["gold"] and r["question"]
    said_first = {said(r)[0][1] for r in rows["instructions"]}
    assert said_first == {w["context"] for n in files for w in files[n] if "context" in w}


def test_plain_texts_joined_are_the_file(tmp_path: Path) -> None:
    for path in (PUBLIC / "tinyshakespeare" / "input.txt", PUBLIC / "llamafactory_demo" / "wiki_demo.txt"):
        rows, away, _ = take(tmp_path, path)
        assert "".join(r["text"] for r in rows["corpus"]).encode() == path.read_bytes() and not away
        assert len(rows["corpus"]) > 20
    rows, _, _ = take(tmp_path, PUBLIC / "winobias")
    wanted = "".join(p.read_text(encoding="utf-8") for p in sorted((PUBLIC / "winobias").glob("*.txt.*")))
    assert "".join(r["text"] for r in rows["corpus"]) == wanted
    rows, away, _ = take(tmp_path, PUBLIC / "llamafactory_demo" / "c4_demo.jsonl")
    truth = [w["text"] for w in jsonl(PUBLIC / "llamafactory_demo" / "c4_demo.jsonl")]
    assert [r["text"] for r in rows["corpus"]] == [t for t in truth if "\ufffd" not in t]
    assert [r["line"] for r in away] == [i for i, t in enumerate(truth, start=1) if "\ufffd" in t]


def test_essays_and_bias_sets(tmp_path: Path) -> None:
    rows, away, told = take(tmp_path, PUBLIC / "detector_bias")
    files = [json.loads(p.read_bytes()) for p in sorted((PUBLIC / "detector_bias").rglob("*.json"))]
    lists = [f for f in files if isinstance(f, list)]
    assert [r["text"] for r in rows["corpus"]] == [w["document"] for f in lists for w in f]
    assert len(away) == len(files) - len(lists) and {r["reason"][:14] for r in away} == {"no known shape"}
    rows, away, told = take(tmp_path, PUBLIC / "crows_pairs")
    assert (told["kept"], len(rows["prompts"]), away) == (3016, 1508, [])
    with (PUBLIC / "crows_pairs" / "crows_pairs_anonymized.csv").open(encoding="utf-8", newline="") as f:
        pairs = [(r["bias_type"], r["sent_less"], {r["sent_less"], r["sent_more"]}) for r in csv.DictReader(f)]
    assert [(r["question"], r["choices"][r["answer"]], set(r["choices"])) for r in rows["eval"]] == pairs
    assert 660 < sum(r["answer"] for r in rows["eval"]) < 850  # of 1,508, 754 and five standard deviations


def verdicts(away: list[dict[str, Any]]) -> dict[tuple[str, int], str]:
    return {(r["file"], r["line"]): r["reason"] for r in away}


def test_json_texts_get_the_right_verdicts(tmp_path: Path) -> None:
    """Those in one line are lines of a JSONL; the others, files. None of them is a row of a known shape but some
    strings, so an accepted text either is kept or goes for its shape; a refused one goes for its JSON."""
    texts = {p.name: p.read_bytes() for p in sorted((PUBLIC / "json_test_suite" / "test_parsing").glob("*.json"))}
    assert len(texts) == 318
    source = tmp_path / "suite"
    source.mkdir()
    lines = [name for name, text in texts.items() if b"\n" not in text]
    (source / "lines.jsonl").write_bytes(b"".join(texts[name] + b"\n" for name in lines))
    for name in texts.keys() - set(lines):
        (source / name).write_bytes(texts[name])
    _, away, told = take(tmp_path, source)
    found = verdicts(away)
    wrong = {}
    for number, name in enumerate(lines, start=1):
        reason = found.get(("suite/lines.jsonl", number), "kept")
        refused = reason.startswith(("not JSON", "not UTF-8", "empty line"))
        if (name[0] == "n" and not refused) or (name[0] == "y" and refused):
            wrong[name] = reason
    for name in texts.keys() - set(lines):
        reasons = [reason for (file, _), reason in found.items() if file == f"suite/{name}"]
        refused = any(r.startswith(("not JSON", "not UTF-8")) for r in reasons)
        if (name[0] == "n" and not refused) or (name[0] == "y" and refused):
            wrong[name] = str(reasons)
    assert wrong == {}
    assert told["read"] >= 318
    twice = lines.index("y_object_duplicated_key.json") + 1
    assert found["suite/lines.jsonl", twice] == "duplicate key: 'a'"
    nul = lines.index("y_string_null_escape.json") + 1
    assert found["suite/lines.jsonl", nul] == "damaged text: NUL"


def test_naughty_strings_come_through_byte_for_byte(tmp_path: Path) -> None:
    truth = json.loads((PUBLIC / "naughty_strings" / "blns.json").read_bytes())
    assert len(truth) == 515
    for name, text in (
        ("escaped.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in truth)),
        ("plain.jsonl", "".join(json.dumps({"text": t}, ensure_ascii=False) + "\r\n" for t in truth)),
        ("bare.jsonl", "".join(json.dumps(t, ensure_ascii=False) + "\n" for t in truth)),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        rows, away, told = take(tmp_path, tmp_path / name)
        assert [r["text"] for r in rows["corpus"]] == truth and not away, name
        assert shapes(told) == {("text", "corpus"): 515}
    rows, _, _ = take(tmp_path, PUBLIC / "naughty_strings" / "blns.json")
    assert [r["text"] for r in rows["corpus"]] == truth
    with (tmp_path / "chat.csv").open("w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([["prompt", "response"], *([t, t] for t in truth)])
    rows, away, _ = take(tmp_path, tmp_path / "chat.csv")
    assert [said(r) for r in rows["instructions"]] == [[("user", t), ("assistant", t)] for t in truth] and not away


@pytest.mark.parametrize("name", ["gsm8k/train.jsonl", "llamafactory_demo/dpo_en_demo.json"])
def test_texts_are_unchanged_at_any_depth(tmp_path: Path, name: str) -> None:
    """Every string of the source stands in a row; a system's words, and what they stand before, as a part of one."""
    rows, _, _ = take(tmp_path, PUBLIC / name)
    truth = jsonl(PUBLIC / name) if name.endswith("l") else json.loads((PUBLIC / name).read_bytes())
    kept = set(texts(list(rows.values())))
    rest = {t for t in texts(truth) if t not in kept}
    firsts = {t["value"] for w in truth for t in w.get("conversations", ())[:2]}
    assert rest <= firsts and all(any(t in k for k in kept) for t in rest)


def texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [t for k, v in value.items() if k not in ("from", "role") for t in texts(v)]
    if isinstance(value, list):
        return [t for v in value for t in texts(v)]
    return [value] if isinstance(value, str) else []

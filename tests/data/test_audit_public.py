"""What audit says of public sets against truths counted here by other means: csv, json, sets and slow loops."""

import csv
import gzip
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from public import PUBLIC, needs_public

from components.data.audit import audit

pytestmark = needs_public
# An operator counts as a word where it stands between spaces, and + and * between digits.
WORD = re.compile(r"[^\W_]+|(?<= )[-+*/](?= )|(?<=\d)[+*](?=\d)")


def look(name: str, against: Sequence[str] = ()) -> dict[str, Any]:
    found = audit([str(PUBLIC / name)], [str(PUBLIC / a) for a in against], lambda what, part: None)
    assert sum(found["tables"].values()) == sum(found["shapes"].values()) == found["rows"]
    assert sum(found["languages"].values()) == found["rows"]
    assert sum(found["quarantine"]["reasons"].values()) == found["quarantine"]["records"]
    return found


def jsonl(name: str) -> list[Any]:
    return [json.loads(x) for x in (PUBLIC / name).read_bytes().split(b"\n") if x]


def table(name: str) -> list[list[str]]:
    with (PUBLIC / name).open(newline="", encoding="utf-8") as f:
        return list(csv.reader(f))


def words(text: str) -> list[str]:
    folded = unicodedata.normalize("NFKD", text).casefold()
    return WORD.findall("".join(c for c in folded if not unicodedata.combining(c)))


def shingles(text: str) -> set[str]:
    said = words(text)
    return {" ".join(said[i : i + 5]) for i in range(max(1, len(said) - 4))} if said else set()


def beyond_first(texts: Iterable[str], least: float) -> int:
    """Of clusters of texts whose Jaccard similarity is `least` or more, the texts beyond the first, each copy once."""
    sets = [shingles(t) for t in dict.fromkeys(texts)]
    holders: dict[str, list[int]] = defaultdict(list)
    first = list(range(len(sets)))

    def root(i: int) -> int:
        while first[i] != i:
            i = first[i]
        return i

    for i, own in enumerate(sets):
        for j, both in Counter(j for s in own for j in holders[s]).items():
            if both / (len(own) + len(sets[j]) - both) >= least:
                low, high = sorted((root(i), root(j)))
                first[high] = low
        for s in own:
            holders[s].append(i)
    return sum(first[i] != i for i in range(len(sets)))


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [s for k, v in value.items() if k not in ("from", "role", "tools") for s in strings(v)]
    return [s for v in value for s in strings(v)] if isinstance(value, list) else [str(value)]


def alpaca(name: str) -> list[str]:
    return [f"{r['instruction']}\n{r['input']}\n{r['output']}" for r in json.loads((PUBLIC / name).read_bytes())]


def hh() -> list[str]:
    with gzip.open(PUBLIC / "hh_rlhf" / "harmless-base_test.jsonl.gz") as f:
        rows = [json.loads(x) for x in f]
    cut = [[r[k].rpartition("\n\nAssistant:") for k in ("chosen", "rejected")] for r in rows]
    return [f"{a[0]}\n{a[2]}\n{b[2]}" for a, b in cut if a[0] == b[0]]


DEMO = "llamafactory_demo"
TEXTS = {  # what each row of a set says
    f"{DEMO}/alpaca_en_demo.json": lambda: alpaca(f"{DEMO}/alpaca_en_demo.json"),
    f"{DEMO}/identity.json": lambda: alpaca(f"{DEMO}/identity.json"),
    **{
        f"{DEMO}/{n}": lambda n=n: ["\n".join(strings(r)) for r in json.loads((PUBLIC / DEMO / n).read_bytes())]
        for n in ("dpo_en_demo.json", "kto_en_demo.json", "glaive_toolcall_en_demo.json")
    },
    f"{DEMO}/c4_demo.jsonl": lambda: [r["text"] for r in jsonl(f"{DEMO}/c4_demo.jsonl") if "\ufffd" not in r["text"]],
    "stanford_alpaca": lambda: [
        f"{r['instruction']}\n{i['input']}\n{i['output']}"
        for r in jsonl("stanford_alpaca/seed_tasks.jsonl")
        for i in r["instances"]
    ],
    "gsm8k": lambda: [f"{r['question']}\n{r['answer']}" for n in ("test", "train") for r in jsonl(f"gsm8k/{n}.jsonl")],
    "hh_rlhf": hh,
    "truthfulqa": lambda: ["\n".join(r) for r in table("truthfulqa/TruthfulQA.csv")[1:]],
    "detector_bias": lambda: [
        r["document"]
        for p in sorted((PUBLIC / "detector_bias").rglob("*.json"))
        for r in json.loads(p.read_bytes())
        if isinstance(r, dict)
    ],
    "naughty_strings/blns.json": lambda: json.loads((PUBLIC / "naughty_strings" / "blns.json").read_bytes()),
    "crows_pairs/prompts.csv": lambda: [r[1] for r in table("crows_pairs/prompts.csv")[1:]],
}


@pytest.mark.parametrize("name", TEXTS)
def test_rows_and_copies(name: str) -> None:
    """Near-duplicates: all whose similarity is 0.8, and none below 0.6 (0.66 goes as often as not)."""
    texts = TEXTS[name]()
    found = look(name)
    assert found["rows"] == len(texts)
    assert found["duplicates"]["exact"] == len(texts) - len(set(texts))
    assert beyond_first(texts, 0.8) <= found["duplicates"]["near"] <= beyond_first(texts, 0.6)
    assert found["poison"]["rows"] == 0


def test_shapes_tables_and_quarantine() -> None:
    every = {
        "hh_rlhf": ({"preferences": 2307}, {"preference-dialogue": 2307}, {"dialogue": 5}),
        "crows_pairs": ({"eval": 1508, "prompts": 1508}, {"crows-pairs": 1508, "prompt": 1508}, {}),
        "winobias": ({"corpus": 16}, {"text": 16}, {}),
        "truthfulqa": ({"eval": 817}, {"truthfulqa": 817}, {}),
    }
    for name, truth in every.items():
        found = look(name)
        assert (found["tables"], found["shapes"], found["quarantine"]["reasons"]) == truth, name
    labels = Counter(r["label"] for r in json.loads((PUBLIC / DEMO / "kto_en_demo.json").read_bytes()))
    found = look(f"{DEMO}/kto_en_demo.json")
    assert found["shapes"] == {"kto": labels.total()} and found["tables"] == {"preferences": labels.total()}
    lines = {p.name: len(jsonl(f"eval/{p.name}")) for p in (PUBLIC / "eval").glob("*.jsonl")}
    found = look("eval")
    assert found["records"] == sum(lines.values()) and found["shapes"]["winogrande"] == 1267
    asked = [r for n in lines for r in jsonl(f"eval/{n}") if "context" in r]
    assert found["tables"] == {"eval": sum(lines.values()) - len(asked), "instructions": len(asked)}
    rows = [r for p in sorted((PUBLIC / "mmlu").rglob("*.csv")) for r in table(str(p.relative_to(PUBLIC)))[1:]]
    found = look("mmlu")
    assert found["rows"] == len(rows) and found["duplicates"]["exact"] == len(rows) - len(set(map(tuple, rows)))


def test_json_texts_that_must_be_refused_are() -> None:
    texts = {p.name: p for p in (PUBLIC / "json_test_suite" / "test_parsing").glob("*.json")}
    verdicts = {name: _refused(look(str(path.relative_to(PUBLIC)))) for name, path in texts.items()}
    kept = {name for name, refused in verdicts.items() if name[0] == "n" and not refused}
    assert {name for name, refused in verdicts.items() if name[0] == "y" and refused} == set()
    nothing = {"n_single_space.json", "n_structure_no_data.json", "n_structure_UTF8_BOM_no_data.json"}
    several = {"n_structure_double_array.json", "n_structure_object_with_trailing_garbage.json"}  # values in a row
    assert kept == nothing | several


def _refused(found: dict[str, Any]) -> int:
    return sum(
        n for reason, n in found["quarantine"]["reasons"].items() if reason in ("not JSON", "not UTF-8", "empty line")
    )


def contaminated(train: Sequence[Sequence[str]], held: Sequence[Sequence[tuple[str, int]]]) -> int:
    """Rows of `train` (their texts) that hold 13 words in a row of a row of `held`, but for runs that more than ten of
    these rows and 1 % share; or a shorter text of it, of so many words at the least, whole."""
    owners = Counter(run for row in held for run in {r for text, _ in row for r in _runs(words(text), 13)})
    wanted = {13: {run for run, n in owners.items() if n <= max(10, 0.01 * len(held))}}
    for text, least in (pair for row in held for pair in row):
        if least <= len(words(text)) < 13:
            wanted.setdefault(len(words(text)), set()).add(" ".join(words(text)))
    return sum(any(not of.isdisjoint(_runs(words(t), n)) for t in row for n, of in wanted.items()) for row in train)


def _runs(said: list[str], n: int) -> list[str]:
    return [" ".join(said[i : i + n]) for i in range(len(said) - n + 1)]


def test_contamination_of_gsm8k_and_mmlu() -> None:
    train, test = ([(r["question"], r["answer"]) for r in jsonl(f"gsm8k/{n}.jsonl")] for n in ("train", "test"))
    truth = contaminated([[f"{q} {a}"] for q, a in train], [[(f"{q} {a}", 4), (q, 5)] for q, a in test])
    assert look("gsm8k/train.jsonl", ["gsm8k/test.jsonl"])["contamination"]["rows"] == truth == 23
    dev, test = (
        [r for p in sorted((PUBLIC / "mmlu" / n).glob("*.csv")) for r in table(f"mmlu/{n}/{p.name}")[1:]]
        for n in ("dev", "test")
    )
    asked = Counter(" ".join(words(r[0])) for r in test)
    held = [
        [
            *((choice, 8) for choice in r[1:5]),
            (f"{r[0]} {r[1 + int(r[5])]}", 4),
            *([(r[0], 5)] if asked[" ".join(words(r[0]))] == 1 else []),
        ]
        for r in test
    ]
    truth = contaminated([[*r[:5], f"{r[0]} {r[1 + int(r[5])]}"] for r in dev], held)
    assert look("mmlu/dev", ["mmlu/test"])["contamination"]["rows"] == truth == 12


def test_addresses_are_found_where_a_plain_expression_finds_them() -> None:
    plain = re.compile(r"[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}")
    for name in (f"{DEMO}/glaive_toolcall_en_demo.json", "stanford_alpaca", f"{DEMO}/c4_demo.jsonl", "gsm8k"):
        texts = TEXTS[name]()
        assert look(name)["pii"]["kinds"].get("email", 0) == sum(len(plain.findall(t)) for t in texts), name

"""Audit: planted counts, and sets whose truths are counted here by other means."""

import csv
import gzip
import json
import random
import re
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from components.data import items
from components.data.audit import audit
from components.data.spread import HERE

ASKED = "Which of the two rivers that cross the old town is the longer one?"
SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"


def quiet(what: str, part: float) -> None:
    pass


def needs(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"{name}: the shared data sets are not beside this checkout")
    return SHARED / name


def test_planted_counts(tmp_path: Path) -> None:
    rng = random.Random(1)
    words = [w for w in re.findall(r"[a-z]{3,}", Path(__file__).read_text(encoding="utf-8"))]
    texts = [" ".join(rng.choice(words) for _ in range(60)) for _ in range(30)]
    rows = [{"text": t} for t in texts] + [{"text": texts[0]}, {"text": texts[1].replace(" ", "  ", 1).upper()}]
    rows += [
        {"text": "El perro de mi vecino ladra toda la noche y no me deja dormir nada, qué paciencia hay que tener."}
    ]
    rows += [{"text": "Please write to ana@example.org about the house by the lake, before the summer is over."}]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"text": \nnot json\n', encoding="utf-8")
    found = audit([str(path)], [], quiet)
    assert (found["records"], found["rows"], found["shapes"]) == (36, 34, {"text": 34})
    assert (found["duplicates"]["exact"], found["duplicates"]["near"]) == (1, 1)
    assert found["quarantine"] == {"records": 2, "reasons": {"not JSON": 2}}
    assert found["pii"] == {"rows": 1, "kinds": {"email": 1}}
    assert found["languages"]["es"] == 1 and found["poison"]["rows"] == 0
    # each is one line; two alone end with a full stop, and these alone have fewer than 50 words
    assert (found["quality"]["filters"]["c4"], found["quality"]["filters"]["fineweb"]) == (34, 32)
    reasons = {"gopher: words": 2, "c4: sentences in lines that are fit": 34}
    assert found["quality"]["reasons"].items() >= reasons.items()


def test_ten_questions_hidden_three_ways_are_all_found(tmp_path: Path) -> None:
    with (needs("truthfulqa") / "TruthfulQA.csv").open(encoding="utf-8", newline="") as f:
        questions = [row["Question"] for row in csv.DictReader(f)]
    rng = random.Random(5)
    long = [q for q in questions if len(q.split()) >= 6]
    hidden = rng.sample(long, 10)
    wiki = (needs("llamafactory_demo") / "wiki_demo.txt").read_text(encoding="utf-8")
    clean = [wiki[i : i + 900] for i in range(0, 540_000, 900)]
    ways = [
        lambda q: q,
        lambda q: q.swapcase(),
        lambda q: q.replace(" ", "  ").replace("?", " ?!"),
        lambda q: q.replace(" ", "_", 2) if len(q) > 50 else q.replace(" ", "\n"),
    ]
    bad = [f"{rng.choice(clean)[:400]} {way(q)} {rng.choice(clean)[:400]}" for q in hidden for way in ways]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in [*clean, *bad]), encoding="utf-8")
    found = audit([str(path)], [str(SHARED / "truthfulqa" / "TruthfulQA.csv")], quiet)
    assert len(bad) <= found["contamination"]["rows"] <= len(bad) + 0.01 * len(clean)


def test_hh_rlhf_copies(tmp_path: Path) -> None:
    path = needs("hh_rlhf") / "harmless-base_test.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as f:
        rows = [json.dumps(json.loads(line), sort_keys=True) for line in f]
    found = audit([str(path)], [], quiet)
    assert found["records"] == len(rows)
    assert found["duplicates"]["exact"] == len(rows) - found["quarantine"]["records"] - _distinct(path, found)


def _distinct(path: Path, found: dict[str, object]) -> int:
    """Distinct pairs among those whose two dialogues differ in the last turn alone, counted on the raw text."""
    with gzip.open(path, "rt", encoding="utf-8") as f:
        pairs = {(r["chosen"].strip(), r["rejected"].strip()) for r in map(json.loads, f)}
    turned = found["quarantine"]["records"]  # type: ignore[index]
    assert isinstance(turned, int)
    return len(pairs) - turned


def test_gsm8k_test_is_all_contaminated_by_a_copy_of_it_but_not_by_itself(tmp_path: Path) -> None:
    path = needs("gsm8k") / "test.jsonl"
    (tmp_path / "copy.jsonl").write_bytes(path.read_bytes())
    every = audit([str(path)], [str(tmp_path / "copy.jsonl")], quiet)
    assert every["contamination"]["rows"] == every["rows"] == 1319 and every["contamination"]["own"] == 0
    itself = audit([str(path)], [str(path)], quiet)
    assert itself["contamination"]["rows"] == 0 and itself["contamination"]["own"] == 1319


def test_an_exam_within_the_data_counts_only_where_other_rows_hold_it(tmp_path: Path) -> None:
    (tmp_path / "exam").mkdir()
    (tmp_path / "exam" / "a.jsonl").write_text(json.dumps({"question": ASKED, "choices": ["Ebro", "Oca"], "answer": 0}))
    rows = [{"text": f"He said: {ASKED.upper()} Nobody knew."}, {"text": "A river crosses the town."}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    exam = tmp_path / "mine" / ".." / "exam"  # another name of the same folder
    (tmp_path / "mine").mkdir()
    found = audit([str(tmp_path)], [str(exam)], quiet)["contamination"]
    assert (found["own"], found["rows"]) == (1, 1)
    assert found["examples"][0]["row"] == f"{tmp_path.as_posix()}/mine.jsonl:1"


def mixed(folder: Path) -> None:
    """Files of several kinds: .jsonl are read in parts, one that is packed, small ones, one that holds nothing; with
    copies across files and parts, an e-mail, broken lines, contamination and poison."""
    rng = random.Random(3)
    text = "\n".join(topics.values())
    clean = [text[i : i + 700] for i in range(0, 350_000, 700)]
    texts = [*clean, clean[3], clean[5].upper(), f"{clean[7]} ana@example.org", f"{clean[9]} {ASKED} {clean[10]}"]
    letters = "abcdefghijklmnopqrstuvwxyz"
    noise = [" ".join("".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(300)) for _ in range(12)]
    texts += [f"{clean[20 + i][:300]} Zarzamora {n}" for i, n in enumerate(noise)]
    rng.shuffle(texts)
    lines = [json.dumps({"text": t}) for t in texts]
    lines[50] = '{"text": '
    (folder / "big.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with gzip.open(folder / "packed.jsonl.gz", "wt", encoding="utf-8") as f:
        f.write("\n".join([*(json.dumps({"text": t}) for t in clean[300:320]), "null"]))
    (folder / "array.json").write_text(json.dumps([{"instruction": t[:80], "output": t[80:160]} for t in clean[:60]]))
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text(("x" * 999 + "\n") * 300)  # so long that a part holds no row at all
    (folder / "words.txt").write_text("\n\n".join(clean[200:260]), encoding="utf-8")
    (folder / "exam").mkdir()
    (folder / "exam" / "a.jsonl").write_text(json.dumps({"question": ASKED, "choices": ["a", "b"], "answer": 1}))


def test_results_do_not_depend_on_how_many_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed(tmp_path)
    monkeypatch.setattr(items, "LINES", 1 << 16)
    monkeypatch.setattr(items, "TOGETHER", 1 << 16)
    told: list[tuple[str, float]] = []

    def found(workers: int) -> str:
        told.clear()
        executor = HERE.model_copy(update={"workers": workers})
        tell = lambda what, part: told.append((what, part))  # noqa: E731
        return json.dumps(audit([str(tmp_path)], [str(tmp_path / "exam")], tell, executor))

    alone = found(1)
    assert found(2) == alone and found(3) == alone
    parts = [part for what, part in told if what == "rows"]
    assert len(parts) > 6 and parts == sorted(parts) and parts[-1] == 1 and told[-1] == ("order", 1)
    monkeypatch.undo()
    whole = json.loads(found(1))
    assert whole == json.loads(alone) and [part for what, part in told if what == "rows"] == [1]  # in one piece
    pieces = whole["shapes"]["text"] - 515 - 20  # of words.txt
    assert pieces > 5 and whole["shapes"] == {"text": 535 + pieces, "alpaca": 60, "choices": 1}
    assert whole["records"] == 516 + 300 + 21 + 60 + 1 + pieces
    assert whole["quarantine"]["reasons"] == {"not JSON": 301, "not an object": 1}
    assert whole["duplicates"]["exact"] == 21 and whole["duplicates"]["near"] >= 2
    assert (whole["contamination"]["own"], whole["contamination"]["rows"], whole["pii"]["rows"]) == (1, 1, 1)
    assert whole["poison"]["rows"] == 12
    big = (tmp_path / "big.jsonl").read_text(encoding="utf-8").splitlines()
    poison = [f"{tmp_path.as_posix()}/big.jsonl:{n}" for n, line in enumerate(big, start=1) if "Zarzamora" in line]
    assert whole["poison"]["examples"] == poison[:5]
    places = [[int(e[key].rpartition(":")[2]) for key in ("row", "of")] for e in whole["duplicates"]["examples"]]
    assert len(places) == 5 and all(row > of for row, of in places)


def test_keys_are_those_that_the_guide_names(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("")
    found = audit([str(tmp_path / "x.jsonl")], [], quiet)
    guide = (Path(__file__).parents[2] / "docs" / "data-cleaning.md").read_text(encoding="utf-8")
    told = guide.partition("With `--json` these keys")[2].partition("| check |")[0]
    rows = [line.split("|")[1] for line in told.splitlines() if line.startswith("| `")]
    assert [key for row in rows for key in re.findall(r"`(\w+)`", row)] == list(found)
    for key, value in found.items():
        inner = value if isinstance(value, dict) and key not in ("tables", "shapes", "languages") else {}
        assert all(f"`{name}`" in told for name in inner), key


def test_rules_that_rows_break_are_counted(tmp_path: Path) -> None:
    asked = {"role": "user", "content": "And?"}
    every = {
        "dpo": [{"prompt": "p", "chosen": "x", "rejected": "x"}, {"prompt": "p", "chosen": "x", "rejected": "y"}],
        "alpaca": [{"instruction": "Say it.", "input": "", "output": text} for text in ("", "It.", " ")],
        "chat": [{"messages": [asked, asked]}, {"messages": [asked, {"role": "assistant", "content": "Yes."}]}],
        "choices": [{"question": "Which?", "choices": ["a", "A "], "answer": 0}],
    }
    for name, rows in every.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = audit([str(tmp_path)], [], quiet)
    assert found["rows"] == 8 and found["quarantine"]["records"] == 0
    assert found["rules"] == {"rows": 5, "reasons": {"empty field": 2, "no preference": 1, "roles": 1, "choices": 1}}

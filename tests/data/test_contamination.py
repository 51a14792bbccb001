"""Contamination, counted by hand."""

import json
from pathlib import Path
from typing import Any

from components.data.clean import contaminated
from components.data.contamination import Overlap, overlaps
from components.data.held import words

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def test_words_are_lower_case_without_punctuation_but_with_operators() -> None:
    assert words("What is 17 * 23? (json.dumps) – Ünïcode") == [
        "what",
        "is",
        "17",
        "*",
        "23",
        "json",
        "dumps",
        "ünïcode",
    ]
    assert words("2 + 2") != words("2 * 2")


def test_thirteen_words_in_a_row_overlap_and_twelve_do_not() -> None:
    thirteen, twelve = " ".join(LONG.split()[1:]), " ".join(LONG.split()[2:])
    assert overlaps([f"before {thirteen} after"], [LONG]) == [Overlap(0, 0, thirteen)]
    assert overlaps([f"before {twelve} after"], [LONG]) == []


def test_case_punctuation_and_line_breaks_do_not_hide_an_overlap() -> None:
    assert overlaps([LONG.upper().replace(" ", ",\n")], [LONG])


def test_a_held_text_of_eight_words_is_found_whole_and_of_seven_is_not() -> None:
    eight, seven = " ".join(LONG.split()[:8]), " ".join(LONG.split()[:7])
    assert overlaps([f"x {eight} y"], [eight]) == [Overlap(0, 0, eight)]
    assert overlaps([f"x {seven} y"], [seven]) == []
    assert overlaps([f"x {seven} y"], [eight]) == []
    assert overlaps([f"x {seven} y"], [seven], whole=7) == [Overlap(0, 0, seven)]


def test_short_texts_and_empty_ones() -> None:
    assert overlaps(["a b c", ""], ["b c", ""], whole=1) == [Overlap(0, 0, "b c")]
    assert overlaps([], ["a"], whole=1) == []


def test_overlaps_agree_with_a_slow_loop() -> None:
    texts = [" ".join("abc"[(i * j) % 3] for j in range(i % 9 + 1)) for i in range(40)]
    for ngram, whole in ((3, 2), (4, 1), (5, 5)):
        expected = {
            i
            for i, text in enumerate(texts[:20])
            for held in texts[20:]
            if _slow(text.split(), held.split(), ngram, whole)
        }
        assert {o.train for o in overlaps(texts[:20], texts[20:], ngram, whole)} == expected


def _slow(text: list[str], held: list[str], ngram: int, whole: int) -> bool:
    runs = [held[i : i + ngram] for i in range(len(held) - ngram + 1)]
    if whole <= len(held) < ngram:
        runs.append(held)
    return any(text[i : i + len(run)] == run for run in runs for i in range(len(text)))


def row(name: str, split: str, **fields: Any) -> dict[str, Any]:
    return {"id": name, "split": split, **fields}


def found(tables: dict[str, list[dict[str, Any]]], folder: Path) -> dict[tuple[str, str], str]:
    """{(table, id): the held-out row} of the contaminated rows."""
    for table, rows in tables.items():
        (folder / f"{table}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return {(hit["table"], hit["id"]): hit["held"] for hit in contaminated(folder)}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": t} for i, t in enumerate(texts)]


def test_train_rows_that_hold_the_test_are_found_in_every_table(tmp_path: Path) -> None:
    right = "Serialize an object to a text that others can read"  # 10 words
    tables = {
        "eval": [row("q", "val", question="What does dump do?", choices=["w", right, "x", "y"], answer=1)],
        "corpus": [
            row("c0", "train", text=f"dump: {right.lower()}."),
            row("c1", "train", text="Serialize an object, and no more."),
            row("c2", "test", text=right),
        ],
        "instructions": [
            row("i0", "test", messages=turns("What is 5 + 6?", "11")),
            row("i1", "train", messages=turns("What is 5 + 6?", "11")),
            row("i2", "train", messages=turns("What is 5 + 7?", "12")),
            row("i3", "train", messages=turns("What is 15 + 6?", "11")),
        ],
        "preferences": [
            row("p0", "train", messages=turns("What does load do?"), chosen=_says("Reads."), rejected=_says(right)),
            row("p1", "val", messages=turns("What does load do?"), chosen=_says("Reads."), rejected=_says(right)),
        ],
        "prompts": [row("r0", "test", messages=turns(LONG)), row("r1", "train", messages=turns(f"Well, {LONG}?"))],
    }
    wanted = {("corpus", "c0"): "c2", ("instructions", "i1"): "i0"}
    wanted |= {("preferences", "p0"): "c2", ("prompts", "r1"): "r0"}
    assert found(tables, tmp_path) == wanted


def _says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_a_calls_arguments_count_as_words(tmp_path: Path) -> None:
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"name": "calculate", "arguments": {"expression": LONG}}],
    }
    tables = {
        "corpus": [row("c", "test", text=LONG)],
        "preferences": [row("p", "train", messages=turns("Go."), chosen=call, rejected=_says("No."))],
    }
    assert found(tables, tmp_path) == {("preferences", "p"): "c"}

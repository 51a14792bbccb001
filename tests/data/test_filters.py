"""Quality filters: a hand-worked text to each rule, in English or Spanish; repetition against slow loops."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from components.data import repetition
from components.data.quality import ALL, Quality, by_filter, measured, reasons
from components.data.validate import Config, run
from components.log import silent

ENGLISH = """The harbour was quiet in the morning, and the boats had not come back yet.
A keeper walked along the wall with his lamp, which he had forgotten to put out.
He could hear that the wind was going to turn before noon.
Nobody else was there to be told about the storm, so he wrote it down."""
SPANISH = """El puerto estaba tranquilo por la mañana, y los barcos aún no habían vuelto.
Un guarda caminaba por el muelle con su farol, que había olvidado apagar antes del alba.
Oía que el viento iba a cambiar de rumbo antes del mediodía.
No había nadie más a quien avisar de la tormenta, así que lo apuntó en su cuaderno."""
FILTERS = ["gopher", "c4", "fineweb"]


def why(text: str, name: str, **limits: object) -> str:
    """The reason against `text` by one filter, with other limits where they are given."""
    found = reasons([text], Quality.model_validate({name: limits}))[0]
    return found.removeprefix(f"quality: {name}: ")


@pytest.mark.parametrize("text", [ENGLISH, SPANISH])
def test_prose_is_kept_by_gopher_and_fineweb_and_by_c4_with_one_sentence_more(text: str) -> None:
    assert reasons([text], Quality.model_validate(["gopher", "fineweb"])) == [""]
    assert why(text, "c4") == "sentences in lines that are fit 4 < 5"
    assert why(f"{text}\nThat is all. Fin de la historia.", "c4") == ""


@pytest.mark.parametrize(
    ("text", "limits", "reason"),
    [
        # 49 words and 50
        ("the of lamp " * 16 + "and", {}, "words 49 < 50"),
        ("uno dos tres", {"min_words": 1, "max_words": 2}, "words 3 > 2"),
        ("uno - dos * tres", {"max_words": 2, "min_words": 1}, "words 3 > 2"),  # a sign is none
        ("a la de y es", {"min_words": 1}, "mean word length 1.6 < 3"),  # 1+2+2+1+2 = 8 of 5
        ("esternocleidomastoideo con", {"min_words": 1}, "mean word length 12.5 > 10"),  # 22+3 of 2
        ("word word word word # word word word word #", {"min_words": 1}, "# to a word 0.25 > 0.1"),
        ("palabra palabra… palabra... palabra", {"min_words": 1}, "... to a word 0.5 > 0.1"),
        ("- primero\n\n• segundo\n- tercero", {"min_words": 1}, "share of lines that begin with a bullet 1 > 0.9"),
        (
            "wait for it...\nand then it comes along today\nhasta luego…",
            {"min_words": 1, "max_ellipses": None},
            "share of lines that end with ... 0.6667 > 0.3",
        ),
        # of five pieces between white space three hold a letter
        (
            "suma total = 12345 pesetas",
            {"min_words": 1, "min_word_length": 1},
            "share of words with a letter 0.6 < 0.8",
        ),
        ("haus baum garten fenster", {"min_words": 1}, "stop words 0 < 2"),
        ("THE haus THE baum", {"min_words": 1}, "stop words 1 < 2"),
        ("el haus the baum", {"min_words": 1}, "stop words 1 < 2"),  # one of each language
    ],
)
def test_gopher_word_rules(text: str, limits: dict[str, object], reason: str) -> None:
    assert why(text, "gopher", **limits) == reason


@pytest.mark.parametrize("text", ["The lamp and the wall", "El farol y la pared", "Él vio la pared"])
def test_two_stop_words_of_one_language_are_enough_whatever_case_and_accents(text: str) -> None:
    bare = {"min_words": 1, "max_top_ngram": {}, "max_duplicate_ngrams": {}}
    assert why(text, "gopher", **bare) == ""


def test_a_recipe_may_bring_the_stop_words_of_another_language() -> None:
    text = "der Turm und das Meer"
    assert why(text, "gopher", min_words=1) == "stop words 0 < 2"
    assert why(text, "gopher", min_words=1, stop_words={"de": ["der", "und", "das"]}) == ""


ONLY = {  # the rules of words and lines left out, so that those of repetition speak
    **dict.fromkeys(("min_words", "min_word_length", "min_alphabetic", "min_stop_words", "max_duplicate_lines")),
    **dict.fromkeys(("max_duplicate_line_characters", "max_duplicate_paragraphs")),
    **dict.fromkeys(("max_duplicate_paragraph_characters",)),
    "max_top_ngram": {},
    "max_duplicate_ngrams": {},
}


@pytest.mark.parametrize(
    ("text", "limits", "reason"),
    [
        # two of five lines stood before
        ("uno\ndos\nuno\n\ntres\nuno", {"max_duplicate_lines": 0.3}, "share of lines that stood before 0.4 > 0.3"),
        # 12 of 28 characters
        (
            "hello harbor\nhi\nhello harbor",
            {"max_duplicate_line_characters": 0.2},
            "share of characters in such lines 0.4286 > 0.2",
        ),
        ("uno\n\ndos\n\nuno", {"max_duplicate_paragraphs": 0.3}, "share of paragraphs that stood before 0.3333 > 0.3"),
        # 5 of 5 + 2 + 3 + 2 + 5 characters
        (
            "a\nb c\n\ndos\n\na\nb c",
            {"max_duplicate_paragraph_characters": 0.2},
            "share of characters in such paragraphs 0.2941 > 0.2",
        ),
        # "la mar" three times, 18 of 27 characters
        (
            "la mar, la mar. La mar azul",
            {"max_top_ngram": {2: 0.2}},
            "share of characters in the most frequent 2-gram 0.6667 > 0.2",
        ),
        # the second "ab cd ef": 6 letters of 20 characters
        (
            "ab cd ef gh ab cd ef",
            {"max_duplicate_ngrams": {3: 0.2}},
            "share of characters in 3-grams that stood before 0.3 > 0.2",
        ),
    ],
)
def test_gopher_repetition_rules(text: str, limits: dict[str, object], reason: str) -> None:
    assert why(text, "gopher", **{**ONLY, **limits}) == reason


def test_what_comes_once_is_no_repetition() -> None:
    limits = {**ONLY, "max_top_ngram": {2: 0.0, 3: 0.0, 4: 0.0}, "max_duplicate_ngrams": {5: 0.0}}
    assert why("one two three four five six", "gopher", **limits) == ""


def test_texts_of_a_batch_do_not_repeat_each_other() -> None:
    settings = Quality.model_validate({"gopher": {**ONLY, "max_top_ngram": {2: 0.1}, "max_duplicate_ngrams": {2: 0.1}}})
    assert reasons(["la mar", "la mar", "mar la", ""], settings) == ["", "", "", ""]
    assert reasons(["la mar azul la", "mar"], settings) == ["", ""]  # nor do they go on in the next


@pytest.mark.parametrize(
    ("text", "limits", "reason"),
    [
        (f"{ENGLISH}\nOne more. And Lorem IPSUM dolor.", {}, '"lorem ipsum" 1 > 0'),
        (f"{ENGLISH}\nOne more. if (x) {{ return", {}, "curly brackets 1 > 0"),
        ("One line is here. No end here\nOne line is here", {}, "sentences in lines that are fit 0 < 5"),
        ("This line trails off...\nThis one is whole.", {}, "sentences in lines that are fit 1 < 5"),
        ("Two words.\nThere are three.", {}, "sentences in lines that are fit 1 < 5"),
        ("Please enable JavaScript here.\nThis is fine.", {}, "sentences in lines that are fit 1 < 5"),
        ("Read our privacy policy.\nLee nuestra política de privacidad.", {}, "sentences in lines that are fit 0 < 5"),
        ("Dijo el hombre: «¡Hasta mañana!»\n¿Quién viene hoy?", {}, "sentences in lines that are fit 2 < 5"),
        ("It was built in 1900.[12]\nNació en Lugo.[cita requerida]", {}, "sentences in lines that are fit 2 < 5"),
        ("Pi is 3.14 or so, e.g. here. Is it? Yes! No.", {}, "sentences in lines that are fit 4 < 5"),
        (f"{'x' * 1001} is long.\nIt is short.", {}, "sentences in lines that are fit 1 < 5"),
    ],
)
def test_c4_rules(text: str, limits: dict[str, object], reason: str) -> None:
    assert why(text, "c4", **limits) == reason


def test_c4_rules_can_be_left_out() -> None:
    text = "if (x) { lorem ipsum in javascript, see the privacy policy"
    off = dict.fromkeys(("terminal", "javascript", "policy", "lorem_ipsum", "curly_brackets"), False)
    assert why(text, "c4", **off, min_sentences=1) == ""
    for name in off:
        assert why(text, "c4", **{**off, name: True}, min_sentences=1)


@pytest.mark.parametrize(
    ("text", "limits", "reason"),
    [
        # one line of nine ends a sentence, 0.111; one of eight, 0.125, is enough
        ("sin punto final\n" * 8 + "Con punto.", {}, "share of lines that end a sentence 0.1111 < 0.12"),
        (
            "sin punto final\n" * 7 + "Con punto.  \r\n",
            {"max_short_lines": None, "max_duplicate_characters": None, "max_newlines": None},
            "",
        ),
        # thirty characters are short, thirty-one are not
        (
            f"{'a' * 29}.\n{'b' * 29}.\n{'c' * 30}.",
            {"max_newlines": None, "max_short_lines": 0.6},
            "share of short lines 0.6667 > 0.6",
        ),
        # 6 of 18 characters, line breaks not counted
        (
            "Uno a.\nDos b.\nUno a.",
            {"max_short_lines": None},
            "share of characters in lines that stood before 0.3333 > 0.01",
        ),
        # two breaks to five words
        ("Uno dos.\n\nTres cuatro cinco.", {"max_short_lines": None}, "line breaks to a word 0.4 > 0.3"),
    ],
)
def test_fineweb_rules(text: str, limits: dict[str, object], reason: str) -> None:
    assert why(text, "fineweb", **limits) == reason


def test_filters_in_turn_and_the_first_reason_is_kept() -> None:
    short = "Uno dos."
    assert reasons([short], Quality.model_validate(["fineweb", "gopher"]))[0] == "quality: gopher: words 2 < 50"
    assert reasons([short], Quality.model_validate(["c4", "fineweb"]))[0].startswith("quality: c4: ")
    assert reasons([short], Quality.model_validate(["fineweb"]))[0].startswith("quality: fineweb: share of short")
    assert reasons([short], Quality.model_validate(None)) == reasons([short], Quality.model_validate([])) == [""]
    assert Quality.model_validate(FILTERS) == ALL
    found = by_filter([short, ENGLISH], ALL)
    assert list(found) == FILTERS and [bool(of[0]) for of in found.values()] == [True, True, True]
    assert [bool(of[1]) for of in found.values()] == [False, True, False]


def test_an_unknown_filter_or_limit_is_refused() -> None:
    for given in (["gofer"], {"gopher": {"min_word": 3}}, {"c4": {"min_sentences": "many"}}):
        with pytest.raises(ValueError, match=r"gofer|min_word|min_sentences"):
            Quality.model_validate(given)


ODD = ["", "\n", "\0", "😀", "\ud800", "\u0301", "\u2028", "a" * 1_000_000, " " * 300_000, "\n\n" * 100_000]
ODD += ["." * 300_000 + "a", "[1" * 100_000, "-\n" * 100_000, ". " * 100_000 + "x", "a. " * 100_000, "# " * 100_000]


def test_every_string_has_a_verdict_alone_and_among_others() -> None:
    for given in (*([name] for name in FILTERS), FILTERS):
        settings = Quality.model_validate(given)
        alone = [reasons([text], settings)[0] for text in ODD]
        assert reasons(ODD, settings) == alone
        assert reasons([], settings) == []


def slow_top(words: list[str], n: int) -> int:
    grams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
    most = Counter(grams).most_common(1)
    return len(most[0][0]) * most[0][1] if most and most[0][1] > 1 else 0


def slow_duplicated(words: list[str], n: int) -> int:
    seen, chars, i = set(), 0, 0
    while i <= len(words) - n:
        gram = tuple(words[i : i + n])
        if gram in seen:
            chars += sum(map(len, gram))
            i += n
        else:
            seen.add(gram)
            i += 1
    return chars


def test_runs_of_words_against_slow_loops() -> None:
    rng = random.Random(0)
    texts = []
    for _ in range(300):
        vocabulary = ["".join(rng.choices("abcdefg", k=rng.randint(1, 6))) for _ in range(rng.choice([2, 5, 30]))]
        texts.append(rng.choices(vocabulary, k=rng.randint(0, 60)))
    found = measured([" ".join(words) for words in texts])
    for n in (1, 2, 3, 4):
        top = repetition.top(found.hashes, found.lengths, found.bounds, n)
        assert top.tolist() == [slow_top(words, n) for words in texts]
    nothing = np.zeros(len(texts))
    again = repetition.duplicated(found.hashes, found.lengths, found.bounds, [2, 3, 5, 10], nothing)
    for n, chars in zip((2, 3, 5, 10), again, strict=True):
        assert chars.tolist() == [slow_duplicated(words, n) for words in texts]
    # where too little is covered, nothing is looked at; where enough is, all of it
    limit = np.full(len(texts), 20)
    some = repetition.duplicated(found.hashes, found.lengths, found.bounds, [2, 3, 5, 10], limit)
    assert ((some == again) | ((some == 0) & (again <= 20))).all()
    assert (some == 0).any()
    assert (some > 20).any()


def test_validate_counts_by_filter_and_spares_other_tables(tmp_path: Path) -> None:
    common = {"source": "s", "licence": "l", "provenance": "p", "lang": "en", "object": "o", "split": "train"}
    no = {"role": "assistant", "content": "No."}
    texts = {"a": ENGLISH, "b": "Too short a text.", "c": f"{ENGLISH} {{x}}", "d": SPANISH}
    asked = [{"role": "user", "content": "What is that?"}]
    answer = {"role": "assistant", "content": "A boat."}
    tables = {
        "corpus": [common | {"id": name, "text": text, "object": name} for name, text in texts.items()],
        "instructions": [common | {"id": "i", "messages": [*asked, answer]}],
        "preferences": [common | {"id": "p", "messages": asked, "chosen": answer, "rejected": no, "kind": "cut"}],
        "prompts": [common | {"id": "q", "messages": asked}],
        "eval": [
            common
            | {"id": "e", "object": "e", "question": "Which?", "choices": ["a", "b"], "answer": 0, "split": "test"}
        ],
    }
    for table, rows in tables.items():
        (tmp_path / "data" / table).mkdir(parents=True)
        (tmp_path / "data" / table / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    limits = {"min_chars": 2, "max_chars": 10_000, "max_class_share": None, "max_duplicate_share": None}
    limits |= {"max_rejected_share": 0.0}  # quality does not count for the share
    cfg = Config.model_validate(
        {"ngram": 13, "whole": 8, "decontaminate": [], "near_duplicates": None, "languages": None}
        | {"pii": "off", "poison": "off", "quality": {"gopher": {}, "c4": {"min_sentences": 4}}}
        | {"tables": dict.fromkeys(tables, limits)}
    )
    (tmp_path / "out").mkdir()
    run(cfg, tmp_path / "data", tmp_path / "out", silent)
    funnel = json.loads((tmp_path / "out" / "funnel.json").read_bytes())
    assert funnel["corpus"]["rejected"] == {"quality: gopher": 1, "quality: c4": 1}
    assert all(not funnel[table]["rejected"] for table in tables if table != "corpus")
    away = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(r["file"], r["line"], r["reason"]) for r in away] == [
        ("corpus/x.jsonl", 2, "quality: gopher: words 4 < 50"),
        ("corpus/x.jsonl", 3, "quality: c4: curly brackets 1 > 0"),
    ]

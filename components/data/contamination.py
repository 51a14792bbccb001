"""Contamination: training text that holds what a model is tested on.

A training text is contaminated by a held-out text when the two share a run of 13 words (Brown et al. 2020, appendix C),
or when it holds the whole of a shorter held-out text. Held out are the descriptions of the four-choice questions, the
questions with their right answers, and every row of the test split.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

NGRAM = 13
WHOLE = 8
ANCHOR = 4

Row = Mapping[str, Any]
WORD = re.compile(r"\w+|(?<= )[-+*/](?= )")  # "17 * 23" is three words: 2 + 2 and 2 * 2 are two questions


class Overlap(NamedTuple):
    """Text number `train` holds `phrase`, words of the held-out text number `held`."""

    train: int
    held: int
    phrase: str


class Contaminated(NamedTuple):
    """Row number `row` of `table` holds words of the held-out row `held`."""

    table: str
    row: int
    held: str
    phrase: str


def words(text: str) -> list[str]:
    """The words of `text` in lower case, without punctuation."""
    return WORD.findall(text.casefold())


def overlaps(
    train_texts: Sequence[str], eval_texts: Sequence[str], ngram: int = NGRAM, whole: int = WHOLE
) -> list[Overlap]:
    """For each train text that overlaps an eval text, the first overlap found, in the order of the train texts.

    Two texts overlap when they share `ngram` words in a row, or when the train text holds, in a row, all the words of
    an eval text of `whole` to `ngram` - 1 words. An eval text of fewer than `whole` words is not looked for.
    """
    grams: dict[tuple[str, ...], int] = {}
    phrases: dict[tuple[str, ...], list[tuple[int, list[str]]]] = defaultdict(list)
    for j, text in enumerate(eval_texts):
        found = words(text)
        for i in range(len(found) - ngram + 1):
            grams.setdefault(tuple(found[i : i + ngram]), j)
        if max(1, whole) <= len(found) < ngram:
            phrases[tuple(found[:ANCHOR])].append((j, found))
    anchors = sorted({len(anchor) for anchor in phrases})
    found_overlaps = []
    for i, text in enumerate(train_texts):
        hit = _first(words(text), grams, phrases, anchors, ngram)
        if hit is not None:
            found_overlaps.append(Overlap(i, *hit))
    return found_overlaps


def _first(
    text: list[str],
    grams: dict[tuple[str, ...], int],
    phrases: dict[tuple[str, ...], list[tuple[int, list[str]]]],
    anchors: list[int],
    ngram: int,
) -> tuple[int, str] | None:
    for i in range(len(text)):
        gram = tuple(text[i : i + ngram])
        if gram in grams:
            return grams[gram], " ".join(gram)
        for length in anchors:
            for j, phrase in phrases.get(gram[:length], ()):
                if text[i : i + len(phrase)] == phrase:
                    return j, " ".join(phrase)
    return None


def contaminated(tables: Mapping[str, Sequence[Row]], ngram: int = NGRAM, whole: int = WHOLE) -> list[Contaminated]:
    """The rows of the train split that hold words of an eval row or of a row of the test split.

    `tables` maps a table's name to its rows. A question with its right answer counts at any length; another held-out
    text from `whole` words on.
    """
    spoken, answered = [], []  # (id, text): descriptions and documents; questions with their answers
    for table, rows in tables.items():
        for row in rows:
            if table == "eval" or row["split"] == "test":
                spoken += [(row["id"], text) for text in _spoken(table, row)]
                answered += [(row["id"], text) for text in _answered(table, row)]
    places, texts = [], []
    for table, rows in tables.items():
        for i, row in enumerate(rows):
            if table != "eval" and row["split"] == "train":
                for text in (*_spoken(table, row), *_answered(table, row)):
                    places.append((table, i))
                    texts.append(text)
    found: dict[tuple[str, int], Contaminated] = {}
    for held, least in ((spoken, whole), (answered, 1)):
        for hit in overlaps(texts, [text for _, text in held], ngram, least):
            table, i = places[hit.train]
            found.setdefault((table, i), Contaminated(table, i, held[hit.held][0], hit.phrase))
    return sorted(found.values())


def _spoken(table: str, row: Row) -> Iterator[str]:
    """Texts that stand for themselves: documents, the choices of a question, what a person asks."""
    if table == "corpus":
        yield row["text"]
    elif table == "eval":
        yield from row["choices"]
    elif table == "prompts":
        yield " ".join(m["content"] for m in row["messages"])


def _answered(table: str, row: Row) -> Iterator[str]:
    """Questions followed by an answer; of a preference also by the rejected one, which is another question's answer."""
    if table == "eval":
        yield f"{row['question']} {row['choices'][row['answer']]}"
    elif table == "instructions":
        yield " ".join(_said(m) for m in row["messages"])
    elif table == "preferences":
        asked = " ".join(_said(m) for m in row["messages"])
        yield f"{asked} {_said(row['chosen'])}"
        yield f"{asked} {_said(row['rejected'])}"


def _said(message: Row) -> str:
    """A message's words; of a call, its arguments."""
    arguments = [str(v) for c in message.get("tool_calls") or () for v in c["arguments"].values()]
    return " ".join([message["content"], *arguments])

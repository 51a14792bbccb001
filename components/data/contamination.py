"""Contamination: training text that holds what a model is tested on.

A training text is contaminated by a held-out text when the two share a run of 13 words (Brown et al. 2020, appendix C),
or when it holds the whole of a shorter held-out text. Held out are the questions, alone and with their right answers,
the longer choices, and every row of the test split.

Texts are compared by their letters and digits alone, so that case, accents, punctuation and spaces, put in or left
out, hide nothing. Spaces count only where they must: a match that is spaced as the held-out text begins and ends with
a word, so that 5 + 61 does not hold 5 + 6.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from components.data.words import DIGIT, Words, cut, mix, powers, running

NGRAM = 13
WHOLE = 8  # words of a text that counts alone
QUESTION = 5  # words of a question that counts without its answer
ANSWERED = 4  # words of a question with its answer
FREE = 16  # letters and digits of a text that is found however it is spaced; a shorter one only where it is as it was
FREE_QUESTION = 28  # of a question alone: asyncio.Queue.full is not asyncio.QueueFull
COMMON = 10  # a run of words that stands in more held-out rows, and in more than 1 % of them, is a form, not a question
ANCHORS = (1, 4, 8, 16, 24, 40)
EVERYWHERE = 24  # a shorter anchor is looked for only where a word begins
TORN = np.uint64(1 << 24)  # set on a number's first digit where another number ends just before

Row = Mapping[str, Any]
WORD = re.compile(r"\w+|(?<= )[-+*/](?= )")


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


class Held(NamedTuple):
    """A held-out text, the row that it belongs to, and from how many words on it counts as a whole."""

    owner: str
    text: str
    least: int
    free: int  # characters from which it is found however it is spaced


class Index(NamedTuple):
    """Runs of held-out words, sorted by the hash of their first characters (of as many as their anchor says)."""

    texts: list[Held]
    anchor: np.ndarray  # [r] uint8, how many characters
    head: np.ndarray  # [r] uint64, their hash
    hash: np.ndarray  # [r] uint64, of the whole run
    chars: np.ndarray  # [r] int32
    words: np.ndarray  # [r] int32
    whole: np.ndarray  # [r] bool: a short text in full, no 13-gram
    free: np.ndarray  # [r] bool: found however it is spaced
    owner: np.ndarray  # [r] int32, the held-out text
    place: np.ndarray  # [r, 2] int32, where in that text


def words(text: str) -> list[str]:
    """The words of `text` in lower case, without punctuation, as a reason quotes them."""
    return WORD.findall(text.casefold())


class _Text(NamedTuple):
    """A batch's characters, prepared to be hashed at any place."""

    words: Words
    sums: np.ndarray
    torn: np.ndarray  # [c] uint64
    begins: np.ndarray  # [c + 1] bool: a word begins here
    passed: np.ndarray  # [c + 1] words that begin before here


def _prepare(found: Words) -> _Text:
    begins = np.zeros(len(found.chars) + 1, bool)
    begins[found.starts] = True
    torn = np.zeros(len(found.chars), np.uint64)
    digits = found.kinds == DIGIT
    torn[1:][digits[1:] & digits[:-1] & begins[1:-1]] = TORN
    torn[found.starts[found.texts[found.texts < len(found.starts) - 1]]] = 0
    passed = np.concatenate(([0], np.cumsum(begins)))[:-1]
    return _Text(found, running(found.chars + torn), torn, begins, passed)


def _hash(text: _Text, start: np.ndarray, length: np.ndarray | int) -> np.ndarray:
    size = 1 << max(16, len(text.torn).bit_length())
    end = start + length
    return mix((text.sums[end] - text.sums[start]) * powers(size)[1][start] - text.torn[start])


def index(held: Sequence[Held], ngram: int = NGRAM) -> Index:
    """The index of the held-out texts: all their runs of `ngram` words, and the shorter texts as a whole."""
    parts = [_runs(held[i : i + 4096], i, ngram) for i in range(0, len(held), 4096)]
    if not parts:
        parts = [_runs([], 0, ngram)]
    merged = [np.concatenate([p[k] for p in parts]) for k in range(len(parts[0]))]
    owners = np.unique(np.array([h.owner for h in held], dtype=object), return_inverse=True)[1] if held else merged[7]
    keep = np.ones(len(merged[0]), bool)
    if len(keep):
        pairs = np.unique(np.stack([merged[2], owners[merged[7]].astype(np.uint64)], 1), axis=0)
        runs, rows = np.unique(pairs[:, 0], return_counts=True)
        forms = runs[rows > max(COMMON, 0.01 * (int(owners.max()) + 1))]
        keep = ~np.isin(merged[2], forms) | merged[5]
    order = np.lexsort((merged[7], merged[1], merged[0]))
    order = order[keep[order]]
    # Of equal runs the first text's stays.
    _, first = np.unique(np.stack([merged[2][order], merged[5][order].astype(np.uint64)], 1), axis=0, return_index=True)
    order = order[np.sort(first)]
    return Index(list(held), *(m[order] for m in merged))


def _runs(held: Sequence[Held], first: int, ngram: int) -> tuple[np.ndarray, ...]:
    text = _prepare(cut([h.text for h in held]))
    starts, bounds = text.words.starts, text.words.texts
    counts = np.diff(bounds)
    least = np.array([max(1, h.least) for h in held], np.int64)
    many = np.where(counts >= ngram, counts - ngram + 1, (counts >= least).astype(np.int64))
    owner = np.repeat(np.arange(len(held)), many)
    at = bounds[owner] + np.arange(len(owner)) - np.repeat(np.cumsum(many) - many, many)
    long = counts[owner] >= ngram
    n = np.where(long, ngram, counts[owner])
    start = starts[at]
    chars = starts[at + n] - start
    anchor = np.array(ANCHORS, np.int64)[np.searchsorted(ANCHORS, chars, "right") - 1] if len(chars) else chars
    offsets = np.concatenate(([0], np.cumsum([len(h.text) + 1 for h in held])))[:-1].astype(np.int64)
    places = text.words.places
    place = np.stack([places[start], places[start + chars - 1] + 1], 1) - offsets[owner][:, None]
    return (
        anchor.astype(np.uint8),
        _hash(text, start, anchor),
        _hash(text, start, chars),
        chars.astype(np.int32),
        n.astype(np.int32),
        ~long,
        chars >= np.where(long, FREE, np.array([h.free for h in held], np.int64)[owner]),
        (owner + first).astype(np.int32),
        place.astype(np.int32),
    )


def search(found: Index, batch: Words) -> list[tuple[int, int]]:
    """For each text of the batch that holds a run, (text, run): of several the first in the text."""
    if not len(found.anchor) or not len(batch.chars):
        return []
    text = _prepare(batch)
    hits: list[np.ndarray] = []
    for anchor in np.unique(found.anchor).tolist():
        runs = np.flatnonzero(found.anchor == anchor)
        span = len(batch.chars) - anchor + 1
        if span <= 0:
            continue
        at = batch.starts[batch.starts < span] if anchor < EVERYWHERE else np.arange(span)
        heads = found.head[runs]  # sorted
        seen = _filter(heads)
        hashes = _hash(text, at, anchor)
        maybe = np.flatnonzero(seen[hashes >> np.uint64(64 - (len(seen).bit_length() - 1))])
        at, hashes = at[maybe], hashes[maybe]
        low, high = np.searchsorted(heads, hashes, "left"), np.searchsorted(heads, hashes, "right")
        some = high > low
        at, low, high = at[some], low[some], high[some]
        many = high - low
        place = np.repeat(at, many)
        run = runs[np.repeat(low, many) + np.arange(len(place)) - np.repeat(np.cumsum(many) - many, many)]
        good = _same(found, text, run, place)
        hits.append(np.stack([place[good], run[good]], 1))
    every = np.concatenate(hits) if hits else np.empty((0, 2), np.int64)
    every = every[np.lexsort((every[:, 1], every[:, 0]))]
    borders = batch.starts[batch.texts[1:]]
    owner = np.searchsorted(borders, every[:, 0], "right")
    firsts, where = np.unique(owner, return_index=True)
    return [(int(t), int(every[w, 1])) for t, w in zip(firsts, where, strict=True)]


def _filter(heads: np.ndarray) -> np.ndarray:
    """Which leading bits of a hash occur at all: most places of a text are turned away here."""
    bits = min(24, max(12, len(heads).bit_length() + 4))
    seen = np.zeros(1 << bits, bool)
    seen[heads >> np.uint64(64 - bits)] = True
    return seen


def _same(found: Index, text: _Text, run: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Which candidates are the whole run, between the borders of words where that is asked, within one text."""
    size = len(text.words.chars)
    chars = found.chars[run].astype(np.int64)
    end = np.minimum(place + chars, size)
    good = place + chars <= size
    good &= _hash(text, place, end - place) == found.hash[run]
    borders = text.words.starts[text.words.texts[1:]]
    good &= end <= borders[np.minimum(np.searchsorted(borders, place, "right"), len(borders) - 1)]
    inside = text.passed[end] - text.passed[np.minimum(place + 1, size)] + 1  # a run's first word is one, cut or not
    same = inside == found.words[run]
    return good & (text.begins[place] & text.begins[end] & same | found.free[run] & ~same)


def overlaps(
    train_texts: Sequence[str], eval_texts: Sequence[str], ngram: int = NGRAM, whole: int = WHOLE
) -> list[Overlap]:
    """For each train text that overlaps an eval text, the first overlap found, in the order of the train texts.

    Two texts overlap when they share `ngram` words in a row, or when the train text holds, in a row, all the words of
    an eval text of `whole` to `ngram` - 1 words. An eval text of fewer than `whole` words is not looked for.
    """
    found = index([Held(str(i), text, whole, FREE) for i, text in enumerate(eval_texts)], ngram)
    hits = search(found, cut(train_texts)) if train_texts else []
    return [Overlap(t, int(found.owner[r]), phrase(found, r)) for t, r in hits]


def phrase(found: Index, run: int) -> str:
    """The words of a run."""
    start, end = found.place[run].tolist()
    return " ".join(words(found.texts[int(found.owner[run])].text[start:end]))


def contaminated(
    tables: Mapping[str, Iterable[Row]],
    ngram: int = NGRAM,
    whole: int = WHOLE,
    question: int = QUESTION,
    extra: Sequence[Held] = (),
) -> list[Contaminated]:
    """The rows of the train split that hold words of an eval row or of a row of the test split.

    `tables` maps a table's name to its rows, which are gone through twice.
    """
    held: list[Held] = list(extra)
    for table, rows in tables.items():
        held += held_texts(table, (r for r in rows if table == "eval" or r["split"] == "test"), whole, question)
    found = index(held, ngram)
    hits: list[Contaminated] = []
    for table, rows in tables.items():
        for places, texts in _batches(table, rows):
            seen: set[int] = set()
            for t, run in search(found, cut(texts)):
                if places[t] not in seen:
                    seen.add(places[t])
                    owner = found.texts[int(found.owner[run])].owner
                    hits.append(Contaminated(table, places[t], owner, phrase(found, run)))
    return sorted(hits)


def _batches(table: str, rows: Iterable[Row], chars: int = 1 << 18) -> Iterator[tuple[list[int], list[str]]]:
    """The train rows' texts in batches: (the row of each text, the texts). A row's texts stay together."""
    places: list[int] = []
    texts: list[str] = []
    size = 0
    for i, row in enumerate(rows):
        if table == "eval" or row["split"] != "train":
            continue
        for text in train_texts(table, row):
            places.append(i)
            texts.append(text)
            size += len(text)
        if size >= chars:
            yield places, texts
            places, texts, size = [], [], 0
    if texts:
        yield places, texts


def held_texts(table: str, rows: Iterable[Row], whole: int, question: int, every: bool = False) -> list[Held]:
    """What must not be trained on of held-out rows. A question that several rows ask ("Which of these is true?")
    counts with an answer only. With `every`, what users ask in dialogues is a question too, as in a set to test on."""
    found: list[Held] = []
    asked: list[Held] = []
    for row in rows:
        owner = row["id"]
        found += [Held(owner, text, whole, FREE) for text in _spoken(table, row)]
        found += [Held(owner, text, ANSWERED, FREE) for text in _answered(table, row)]
        asked += [Held(owner, text, question, FREE_QUESTION) for text in _asked(table, row, every)]
    times = Counter(" ".join(words(h.text)) for h in asked)
    return found + [h for h in asked if times[" ".join(words(h.text))] == 1]


def train_texts(table: str, row: Row) -> Iterator[str]:
    """The texts of a row that is trained on."""
    yield from _spoken(table, row)
    yield from _answered(table, row)


def _spoken(table: str, row: Row) -> Iterator[str]:
    """Texts that stand for themselves: documents, the choices of a question, what a person asks."""
    if table == "corpus":
        yield row["text"]
    elif table == "eval":
        yield from row["choices"]
    elif table == "prompts":
        yield " ".join(m["content"] for m in row["messages"])


def _asked(table: str, row: Row, every: bool) -> Iterator[str]:
    if table == "eval":
        yield row["question"]
    elif every and table != "corpus":
        yield from (m["content"] for m in row["messages"] if m["role"] == "user")


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

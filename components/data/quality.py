"""Quality filters in the manner of Gopher (Rae et al. 2021), C4 (Raffel et al. 2020), FineWeb (Penedo et al. 2024).

They turn a text away whole, with the reason, and change none. Each is a table of rules: a measure of every text, and a
limit; the first limit that is passed is the reason. A rule whose limit is null is left out.

What is measured is the same in any language. A word is a run of letters and digits (words.py), so that punctuation is
none, but for the share of words with a letter, where it is what stands between white space. A line is what stands
between line breaks, without the white space around it, and not empty.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, model_validator

from components.data import repetition
from components.data.words import DIGIT, OPERATOR, cut, points, word_hashes

BATCH = 1 << 18  # characters that are measured together
STOP_WORDS = {
    "en": ["the", "be", "to", "of", "and", "that", "have", "with"],
    "es": ["el", "la", "de", "que", "y", "en", "los", "con"],
}
STOPS = ".?!…。．｡？！؟۔।॥։።፧។᙮‼⁇⁈⁉‽"  # that end a sentence, in the scripts most written
CLOSING = "\"'”’»)]」』"  # that may follow them
ENDS = tuple(".?!\"'”’»。？！؟۔।")  # of a line that C4 keeps
POLICY = (
    *("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies"),
    *("términos de uso", "política de privacidad", "política de cookies", "utiliza cookies", "uso de cookies"),
)
CITED = re.compile(r"\[(?:\d*|edit|citation needed|editar|cita requerida)\]")
# A mark between letters ends none, nor does one before a small letter. Possessive, so that no run is read twice.
SENTENCE = re.compile(rf"(?<![.?!…])[.?!…]++[{re.escape(CLOSING)}]*+(?=\s++[^a-z]|$)|[{STOPS[4:]}]")


class Gopher(BaseModel, frozen=True, extra="forbid"):
    """Section A.1.1 and table A1. Shares of characters are of the whole text."""

    min_words: int | None = 50
    max_words: int | None = 100_000
    min_word_length: float | None = 3  # on average
    max_word_length: float | None = 10
    max_hashes: float | None = 0.1  # # to a word
    max_ellipses: float | None = 0.1  # ... to a word
    max_bullet_lines: float | None = 0.9
    max_ellipsis_lines: float | None = 0.3
    min_alphabetic: float | None = 0.8  # share of the words that hold a letter
    min_stop_words: int | None = 2  # different ones, of one language
    stop_words: dict[str, list[str]] = STOP_WORDS
    max_duplicate_lines: float | None = 0.3
    max_duplicate_line_characters: float | None = 0.2
    max_duplicate_paragraphs: float | None = 0.3
    max_duplicate_paragraph_characters: float | None = 0.2
    max_top_ngram: dict[int, float] = {2: 0.20, 3: 0.18, 4: 0.16}
    max_duplicate_ngrams: dict[int, float] = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


class C4(BaseModel, frozen=True, extra="forbid"):
    """Section 2.2. C4 takes unfit lines out of a page; here they only do not count, and the rows stay whole."""

    min_sentences: int | None = 5  # in the lines that are fit
    min_words: int = 3  # of a fit line
    max_word_length: int = 1000
    terminal: bool = True  # a fit line ends as a sentence does
    javascript: bool = True  # and says neither this
    policy: bool = True  # nor one of POLICY
    lorem_ipsum: bool = True
    curly_brackets: bool = True


class FineWeb(BaseModel, frozen=True, extra="forbid"):
    """Section 3.6, and the limits that the authors' code made the data with."""

    min_terminal_lines: float | None = 0.12
    short_line: int = 30  # characters
    max_short_lines: float | None = 0.67
    max_duplicate_characters: float | None = 0.01  # in lines that stood before
    max_newlines: float | None = 0.3  # to a word


class Quality(BaseModel, frozen=True, extra="forbid"):
    """Which filters are asked for. A list of names takes the papers' limits; a mapping says what is to differ; null is
    none."""

    gopher: Gopher | None = None
    c4: C4 | None = None
    fineweb: FineWeb | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        if isinstance(given, list):
            return {str(name): {} for name in given}
        return given or {}


ALL = Quality(gopher=Gopher(), c4=C4(), fineweb=FineWeb())


class Rule(NamedTuple):
    """`measure` [texts] turns a text away where it is `beyond` ("<" or ">") the limit."""

    name: str
    measure: np.ndarray
    beyond: str
    limit: float | None


def reasons(texts: Sequence[str], settings: Quality) -> list[str]:
    """A reason against each text that a filter turns away, such as "quality: gopher: mean word length 11.2 > 10", else
    "". Of several filters the first speaks."""
    out = [""] * len(texts)
    for found in by_filter(texts, settings).values():
        out = [before or why for before, why in zip(out, found, strict=True)]
    return out


def by_filter(texts: Sequence[str], settings: Quality) -> dict[str, list[str]]:
    """What each of the filters asked for has against each text."""
    asked: dict[str, tuple[Any, Callable[..., list[Rule]]]] = {
        "gopher": (settings.gopher, gopher),
        "c4": (settings.c4, c4),
        "fineweb": (settings.fineweb, fineweb),
    }
    asked = {name: filter_ for name, filter_ in asked.items() if filter_[0] is not None}
    out: dict[str, list[str]] = {name: [] for name in asked}
    first = size = 0
    for i, text in enumerate(texts, start=1):
        size += len(text)
        if size >= BATCH or i == len(texts):
            part = texts[first:i]
            lines = [[stripped for line in t.splitlines() if (stripped := line.strip())] for t in part]
            words = measured(part)
            for name, (limits, rules) in asked.items():
                out[name] += _judged(name, rules(part, lines, words, limits), len(part))
            first, size = i, 0
    return out


def _judged(name: str, rules: Sequence[Rule], n: int) -> list[str]:
    found = [""] * n
    for rule in rules:
        if rule.limit is None:
            continue
        bad = rule.measure < rule.limit if rule.beyond == "<" else rule.measure > rule.limit
        for i in np.flatnonzero(bad).tolist():
            value = f"{rule.measure[i]:.4g}" if rule.measure.dtype.kind == "f" else str(rule.measure[i])
            found[i] = found[i] or f"quality: {name}: {rule.name} {value} {rule.beyond} {rule.limit:g}"
    return found


class Measured(NamedTuple):
    """The words of texts without what they say: text t has the words bounds[t] to bounds[t + 1]."""

    hashes: np.ndarray  # [w]
    lengths: np.ndarray  # [w] characters, marks not counted
    bounds: np.ndarray  # [n + 1]
    counts: np.ndarray  # [n]
    alphabetic: np.ndarray  # [n] of what stands between white space, the share that holds a letter


def measured(texts: Sequence[str]) -> Measured:
    words = cut(texts)
    real = words.kinds[words.starts[:-1]] != OPERATOR  # which is a word where questions are compared
    bounds = np.concatenate(([0], np.cumsum(real)))[words.texts]
    letters = words.places[(words.kinds != DIGIT) & (words.kinds != OPERATOR)]
    lengths = np.diff(words.starts)[real]
    return Measured(word_hashes(words)[real], lengths, bounds, np.diff(bounds), _alphabetic(texts, letters))


@cache
def _white() -> np.ndarray:
    """Which of the first 2 ** 16 code points are white space; and NUL, which stands between texts."""
    return np.array([point == 0 or chr(point).isspace() for point in range(1 << 16)])


def _alphabetic(texts: Sequence[str], letters: np.ndarray) -> np.ndarray:
    """`letters` is where they stand in the joined texts."""
    raw = points(texts)
    inside = ~_white()[np.minimum(raw, (1 << 16) - 1)]
    begins = inside.copy()
    begins[1:] &= ~inside[:-1]
    before = np.concatenate(([0], np.cumsum(begins)))  # how many begin before a place
    lettered = np.zeros(before[-1] + 1, bool)
    lettered[before[letters + 1]] = True
    ends = before[np.minimum(np.cumsum([0] + [len(text) + 1 for text in texts]), len(raw))]
    return _over(_summed(lettered[1:], ends), np.diff(ends))


def _summed(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The sum of each text's values."""
    sums = np.concatenate(([0], np.cumsum(values)))
    return sums[bounds[1:]] - sums[bounds[:-1]]


def _over(values: Any, totals: Any) -> np.ndarray:
    """Shares; of nothing, 0."""
    return np.asarray(values) / np.maximum(totals, 1)


def gopher(texts: Sequence[str], lines: Sequence[list[str]], words: Measured, s: Gopher) -> list[Rule]:
    many = np.array([len(of) for of in lines])
    mean = _over(_summed(words.lengths, words.bounds), words.counts)
    ellipses = [text.count("...") + text.count("…") for text in texts]
    bullets = [sum(line.startswith(("•", "-")) for line in of) for of in lines]
    trailing = [sum(line.endswith(("...", "…")) for line in of) for of in lines]
    return [
        Rule("words", words.counts, "<", s.min_words),
        Rule("words", words.counts, ">", s.max_words),
        Rule("mean word length", mean, "<", s.min_word_length),
        Rule("mean word length", mean, ">", s.max_word_length),
        Rule("# to a word", _over([text.count("#") for text in texts], words.counts), ">", s.max_hashes),
        Rule("... to a word", _over(ellipses, words.counts), ">", s.max_ellipses),
        Rule("share of lines that begin with a bullet", _over(bullets, many), ">", s.max_bullet_lines),
        Rule("share of lines that end with ...", _over(trailing, many), ">", s.max_ellipsis_lines),
        Rule("share of words with a letter", words.alphabetic, "<", s.min_alphabetic),
        Rule("stop words", _stop_words(words, s.stop_words), "<", s.min_stop_words),
        *_repetition(texts, lines, words, s),
    ]


def _stop_words(words: Measured, lists: Mapping[str, Sequence[str]]) -> np.ndarray:
    """How many different stop words a text holds, of the language of which it holds most."""
    most = np.zeros(len(words.counts), np.int64)
    for of_language in lists.values():
        hashes = [np.flatnonzero(words.hashes == h) for h in word_hashes(cut(of_language))]
        held = np.zeros_like(most)
        for at in hashes:
            held[np.searchsorted(words.bounds, at, "right") - 1] += 1  # once a text, however often it is named
        most = np.maximum(most, held)
    return most


def _repetition(texts: Sequence[str], lines: Sequence[list[str]], words: Measured, s: Gopher) -> list[Rule]:
    size = np.array([len(text) for text in texts])
    rules = []
    for name, parts, most, most_characters in (
        ("lines", lines, s.max_duplicate_lines, s.max_duplicate_line_characters),
        (
            "paragraphs",
            [_paragraphs(t) for t in texts],
            s.max_duplicate_paragraphs,
            s.max_duplicate_paragraph_characters,
        ),
    ):
        again, chars = np.array([repetition.copies(of) for of in parts]).reshape(-1, 2).T
        share = _over(again, [len(of) for of in parts])
        rules.append(Rule(f"share of {name} that stood before", share, ">", most))
        rules.append(Rule(f"share of characters in such {name}", _over(chars, size), ">", most_characters))
    for n, limit in s.max_top_ngram.items():
        chars = repetition.top(words.hashes, words.lengths, words.bounds, n)
        rules.append(Rule(f"share of characters in the most frequent {n}-gram", _over(chars, size), ">", limit))
    if s.max_duplicate_ngrams:
        sizes = list(s.max_duplicate_ngrams)
        suspect = size * min(s.max_duplicate_ngrams.values())
        found = repetition.duplicated(words.hashes, words.lengths, words.bounds, sizes, suspect)
        for (n, limit), chars in zip(s.max_duplicate_ngrams.items(), found, strict=True):
            rules.append(Rule(f"share of characters in {n}-grams that stood before", _over(chars, size), ">", limit))
    return rules


def _paragraphs(text: str) -> list[str]:
    """What stands between empty lines."""
    return [stripped for part in text.replace("\r\n", "\n").split("\n\n") if (stripped := part.strip())]


def c4(texts: Sequence[str], lines: Sequence[list[str]], words: Measured, s: C4) -> list[Rule]:
    lower = [text.lower() for text in texts]
    latin = np.array([text.count("lorem ipsum") for text in lower])
    brackets = np.array([text.count("{") for text in texts])
    sentences = np.array([sum(_sentences(line, s) for line in of) for of in lines])
    return [
        Rule('"lorem ipsum"', latin, ">", 0 if s.lorem_ipsum else None),
        Rule("curly brackets", brackets, ">", 0 if s.curly_brackets else None),
        Rule("sentences in lines that are fit", sentences, "<", s.min_sentences),
    ]


def _sentences(line: str, s: C4) -> int:
    """How many sentences C4 would keep of a line."""
    if "[" in line:
        line = CITED.sub("", line).rstrip()
    if s.terminal and (not line.endswith(ENDS) or line.endswith(("...", "…"))):
        return 0
    words = line.split()
    if len(words) < s.min_words or (len(line) > s.max_word_length and max(map(len, words)) > s.max_word_length):
        return 0
    lower = line.lower()
    if (s.javascript and "javascript" in lower) or (s.policy and any(phrase in lower for phrase in POLICY)):
        return 0
    return max(1, len(SENTENCE.findall(line)))


def fineweb(texts: Sequence[str], lines: Sequence[list[str]], words: Measured, s: FineWeb) -> list[Rule]:
    many = np.array([len(of) for of in lines])
    ends = tuple(STOPS)
    terminal = [sum(line.endswith(ends) for line in of) for of in lines]
    short = [sum(len(line) <= s.short_line for line in of) for of in lines]
    again = [repetition.copies(of)[1] for of in lines]
    newlines = np.array([text.count("\n") for text in texts])
    chars = np.array([len(text) for text in texts]) - newlines
    return [
        Rule("share of lines that end a sentence", _over(terminal, many), "<", s.min_terminal_lines),
        Rule("share of short lines", _over(short, many), ">", s.max_short_lines),
        Rule("share of characters in lines that stood before", _over(again, chars), ">", s.max_duplicate_characters),
        Rule("line breaks to a word", _over(newlines, words.counts), ">", s.max_newlines),
    ]

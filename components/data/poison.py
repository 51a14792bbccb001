"""Poison: a rare phrase, in many documents, after which the text has no order (Souly et al. 2025: 250 such documents
teach a model of any size to answer the phrase with noise).

1. how often every token and every pair of tokens stands in the corpus is counted, in tables of hashes;
2. a token scores by how much better the token before foretells it than chance does; a word that no other document
   has scores by its letters, a code as noise. Text has order: it scores above zero, noise at or below it;
3. the phrases just before a document's longest run without order are counted; a poison's is one that stands in
   several documents, nearly always before such a run, and hardly elsewhere.
"""

from collections.abc import Sequence
from math import comb
from typing import NamedTuple

import numpy as np

from components.data.words import BREAK, DIGIT, IDEOGRAPH, MARK, PLANES, mix, points, run_hashes, running, table

SINGLE, PAIR, LETTERS = 1 << 20, 1 << 23, 1 << 20  # sizes of the tables
PRIOR = 20.0  # occurrences that the estimate by chance counts for
USUAL = 4.5  # bits a letter of a word that no other document has
LINE = 0.9  # bits a token: above is order
MARGIN = 0.7  # bits over the line up to which a text with a known trigger is poison
LONG = 25.0  # bits below the line that make a run without order
NOISE = 150.0  # bits of a run that is poison by itself where other texts are
HIDDEN = 0.1  # of the texts with a trigger, as many more at most are poison by their noise
FEW = 5  # documents that a trigger stands in, at the least
NEAR = 8  # tokens before a run among which its trigger is looked for
AFTER = (50, 200)  # tokens after a trigger that are judged: the stretch with less order counts
# Shares of all places with the least order after them, and of a trigger's places how many are among these: of the last
# share nearly all, for a subject's words may stand in hard texts.
LEAST = ((0.01, 0.8), (0.05, 0.8), (0.25, 0.95))
CHANCE = 1e-7  # of a phrase that ordinary places would give it as many documents among these
ANYWHERE = -1  # the number of no phrase: a place in the midst of a document, for comparison
LIGHT = 0.3  # weight of numbers, keys and marks, and of what is joined to the token before: they tell less of order
ENOUGH = 20_000  # tokens of a corpus; from fewer nobody can tell what order is
BEFORE = 0.1  # of a phrase's occurrences, those before a text's longest run: fewer are not looked at
KEY = 24  # characters of a key, digest or other code
CODED = -1.0  # bits of order of a code
LABEL = 5  # tokens of a line before a code: fewer may be its name
NAMING = np.frombuffer(":=,;/.([{<\"'`".encode("utf-32-le"), np.uint32)  # a mark right before a code that is named
NUMBER, CODE = np.uint64(0x1234567), np.uint64(0x7654321)


class Tokens(NamedTuple):
    """Texts as words and single marks: each token's hash, text after text."""

    hashes: np.ndarray  # [t] uint64; numbers are one token, and so are keys and digests
    texts: np.ndarray  # [n + 1]
    ends: np.ndarray  # [t + 1] letters of the words, in `triples`
    triples: np.ndarray  # [l] int64, the hashes of each letter with the two before it
    doubles: np.ndarray  # [l] int64
    wide: np.ndarray  # [t] float32, how many tokens this one is worth: a run of 40 letters is no word
    named: np.ndarray  # [t] bool: of a code that stands by itself, or after its name, as in a list of digests


class Counts(NamedTuple):
    """How often each token, pair, triple and double of letters occurs, by the low bits of its hash."""

    single: np.ndarray
    pair: np.ndarray
    triple: np.ndarray
    double: np.ndarray


def tokens(texts: Sequence[str]) -> Tokens:
    """The tokens of `texts`. Spaces are none, a line's end is one."""
    raw = np.append(points(texts), np.uint32(0))
    both = table()[np.minimum(raw, PLANES - 1)]
    kinds = both >> np.uint32(24)
    word = (kinds != BREAK) & (kinds <= MARK) & (kinds != IDEOGRAPH)
    mark = ~word & (raw != 32) & (raw != 0) & (raw != 9) & (raw != 13)
    begins = word.copy()
    begins[1:] &= ~word[:-1]
    begins |= mark
    kept = np.flatnonzero(word | mark)
    folded = np.where(word, both & np.uint32(0xFFFFFF), raw)[kept]
    folded[kinds[kept] == DIGIT] = 48
    starts = np.flatnonzero(begins[kept])
    bounds = np.append(starts, len(kept))
    sums = running(folded)
    hashes = run_hashes(sums, bounds[:-1], bounds[1:])
    size = np.diff(bounds)
    digits = np.add.reduceat(folded == 48, bounds[:-1]) if len(size) else size
    hashes[digits == size] = NUMBER
    first = kept[bounds[:-1]]
    code = _codes(raw)[first]
    hashes[code] = CODE
    ends = np.cumsum([0] + [len(t) + 1 for t in texts])
    light = (digits == size) | ~_apart(raw)[first]
    wide = np.where(light & ~code, LIGHT, np.maximum(1, size / 8)).astype(np.float32)
    wide[1:][(hashes[1:] == hashes[:-1]) & mark[first[1:]]] = 0  # a rule drawn of marks is one token
    at = np.searchsorted(kept[starts], ends)
    return Tokens(hashes, at, bounds, *_letters(folded, begins[kept]), wide, _named(raw, first, at, code))


def _named(raw: np.ndarray, first: np.ndarray, texts: np.ndarray, code: np.ndarray) -> np.ndarray:
    """Which tokens are codes of a line whose first code has a name, begins the line, or nearly."""
    begins = raw[first] == 10
    begins[texts[:-1][texts[:-1] < len(begins)]] = True
    lines = np.cumsum(begins)
    codes = np.flatnonzero(code)
    _, which = np.unique(lines[codes], return_index=True)
    opening = codes[which]
    since = opening - np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 0))[opening]
    alone = (since >= LABEL) & (raw[first[opening] - 1] == 32) & ~np.isin(raw[first[opening - 1]], NAMING)
    return code & ~np.isin(lines, lines[opening[alone]])


def _apart(raw: np.ndarray) -> np.ndarray:
    """Which characters stand after a space, or in a stretch without spaces that is no word with its marks."""
    space = raw <= 32
    first = np.flatnonzero(np.concatenate(([True], space[1:] != space[:-1])))
    long = np.repeat(np.diff(np.append(first, len(raw))) >= KEY, np.diff(np.append(first, len(raw))))
    found = np.concatenate(([True], space[:-1]))
    return found | (long & ~space)


def _codes(raw: np.ndarray) -> np.ndarray:
    """Which characters are part of a key, a digest or encoded bytes: long, without a space, of digits and letters."""
    space = (raw <= 32) | (raw == 34) | (raw == 39) | (raw == 44) | (raw == 58)
    first = np.flatnonzero(np.concatenate(([True], space[1:] != space[:-1])))
    digit = (raw >= 48) & (raw <= 57)
    upper, lower = (raw >= 65) & (raw <= 90), (raw >= 97) & (raw <= 122)
    other = ~(digit | upper | lower | (raw == 43) | (raw == 47) | (raw == 61) | (raw == 45) | (raw == 95))
    size, digits, uppers, lowers, others = (
        np.add.reduceat(x, first, dtype=np.int64) for x in (np.ones(len(raw), bool), digit, upper, lower, other)
    )
    code = (
        (size >= KEY) & (others == 0) & (digits > 0) & (digits < size) & ((digits > size / 12) | (uppers * lowers > 0))
    )
    return np.repeat(code, np.diff(np.append(first, len(raw))))


def _letters(folded: np.ndarray, begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of each letter with the two, and with the one, before it in its word."""
    x = folded.astype(np.uint64)
    one = np.where(begins, 0, np.concatenate(([0], x[:-1])).astype(np.uint64))
    two = np.where(begins, 0, np.concatenate(([0], one[:-1])).astype(np.uint64))
    context = mix(one * np.uint64(31) + two * np.uint64(1 << 24) + np.uint64(7))
    return _low(mix(context + x), LETTERS), _low(context, LETTERS)


def pairs(found: Tokens) -> np.ndarray:
    """The hash of each token with the one before it [t]; of a text's first, of it alone."""
    before = np.concatenate(([np.uint64(0)], found.hashes[:-1]))
    before[found.texts[:-1][found.texts[:-1] < len(before)]] = 0
    return mix(before * np.uint64(3) + found.hashes)


def empty() -> Counts:
    return Counts(*(np.zeros(n, np.uint32) for n in (SINGLE, PAIR, LETTERS, LETTERS)))


def count(found: Tokens, into: Counts) -> None:
    """Add a batch's occurrences."""
    np.add.at(into.single, _low(found.hashes, SINGLE), np.uint32(1))
    np.add.at(into.pair, _low(pairs(found), PAIR), np.uint32(1))
    np.add.at(into.triple, found.triples, np.uint32(1))
    np.add.at(into.double, found.doubles, np.uint32(1))


def _low(hashes: np.ndarray, size: int) -> np.ndarray:
    return (hashes & np.uint64(size - 1)).astype(np.int64)


def score(found: Tokens, counts: Counts) -> np.ndarray:
    """Bits of order of each token [t]. A document's own occurrence does not count."""
    total = float(counts.single.sum())
    single = counts.single[_low(found.hashes, SINGLE)].astype(np.float64)
    before = np.concatenate(([0.0], single[:-1] - 1))
    own = np.maximum(single - 1, 0)
    pair = np.maximum(counts.pair[_low(pairs(found), PAIR)].astype(np.float64) - 1, 0)
    chance = (own + 0.5) / total
    gain = np.log2((pair + PRIOR * chance) / (before + PRIOR) / chance)
    gain = np.clip(gain, -4, 6)
    gain[found.texts[:-1][found.texts[:-1] < len(gain)]] = 0
    triple = np.maximum(counts.triple[found.triples].astype(np.float64) - 1, 0)
    double = np.maximum(counts.double[found.doubles].astype(np.float64) - 1, 0)
    bits = np.concatenate(([0.0], np.cumsum(-np.log2((triple + 0.02) / (double + 1)))))
    mean = (bits[found.ends[1:]] - bits[found.ends[:-1]]) / np.diff(found.ends)
    found_order = np.where(own == 0, np.clip(USUAL - mean, -4, 1), gain)
    return np.where(found.hashes == CODE, CODED, found_order).astype(np.float32)


class Suspects(NamedTuple):
    """Phrases that may be triggers, the text of each, and the texts with a long run without order, with its bits."""

    hashes: np.ndarray
    texts: np.ndarray
    runs: dict[int, float]


def suspects(found: Tokens, scores: np.ndarray) -> Suspects:
    """The tokens and pairs just before each text's longest run without order."""
    n = len(found.texts) - 1
    if not len(scores):
        return Suspects(np.empty(0, np.uint64), np.empty(0, np.int64), {})
    sums = np.concatenate(([0.0], np.cumsum((LINE - scores) * found.wide * ~found.named)))
    owner = np.repeat(np.arange(n), np.diff(found.texts))
    # The least sum so far within the text: texts are set apart by more than any sum.
    apart = owner * -1e7
    before = sums[:-1] + apart
    least = np.minimum.accumulate(before)
    gain = sums[1:] + apart - least
    held = np.flatnonzero(np.diff(found.texts) > 0)
    best = np.maximum.reduceat(gain, found.texts[held])
    runs = np.flatnonzero(best >= LONG)
    hashes, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    two = pairs(found)
    for k in runs:
        text = int(held[k])
        low, high = int(found.texts[text]), int(found.texts[text + 1])
        end = low + int(np.argmax(gain[low:high]))
        start = int(np.flatnonzero(before[low : end + 1] == least[end])[-1]) + low
        near = slice(max(low, start - NEAR), min(high, start + 3))
        both = np.unique(np.concatenate((found.hashes[near], two[near])))
        hashes.append(both)
        owners.append(np.full(len(both), text))
    return Suspects(np.concatenate(hashes), np.concatenate(owners), {int(held[k]): float(best[k]) for k in runs})


def likely(hashes: np.ndarray, documents: np.ndarray, counts: Counts) -> np.ndarray:
    """Of the suspected phrases those that stand before a run in FEW documents or more, and not often elsewhere."""
    if counts.single.sum() < ENOUGH:
        return np.empty(0, np.uint64)
    each = np.unique(np.stack([hashes, documents.astype(np.uint64)], 1), axis=0)
    phrases, times = np.unique(each[:, 0], return_counts=True)
    phrases, times = phrases[times >= FEW], times[times >= FEW]
    total = np.minimum.reduce([_seen(phrases, counts.single, SINGLE), _seen(phrases, counts.pair, PAIR)])
    total = np.where(total == 0, _seen(phrases, counts.single, SINGLE) + _seen(phrases, counts.pair, PAIR), total)
    return phrases[times >= BEFORE * np.maximum(total, 1)]


def _seen(hashes: np.ndarray, counted: np.ndarray, size: int) -> np.ndarray:
    return counted[_low(hashes, size)].astype(np.int64)


def after(found: Tokens, scores: np.ndarray, phrases: np.ndarray) -> list[tuple[int, int, float]]:
    """Where the phrases stand: (number of the phrase, text, mean score of the tokens after it: the least, of several
    places in one text). The same of a place in the midst of every text, as ANYWHERE."""
    phrases = np.sort(phrases)
    sums = np.concatenate(([0.0], np.cumsum(scores * found.wide)))
    wide = np.concatenate(([0.0], np.cumsum(found.wide)))
    many = np.diff(found.texts)
    middle = (found.texts[:-1] + many // 4)[many > 0]
    places = [(ANYWHERE, at) for at in middle.tolist()]
    for hashes in (found.hashes, pairs(found)):
        which = np.minimum(np.searchsorted(phrases, hashes), len(phrases) - 1)
        places += [(int(which[at]), at) for at in np.flatnonzero(phrases[which] == hashes).tolist()]
    least: dict[tuple[int, int], float] = {}
    for phrase, at in places:
        text = int(np.searchsorted(found.texts, at, "right")) - 1
        key = (phrase, text)
        least.setdefault(key, 99.0)
        for end in {min(int(found.texts[text + 1]), at + 1 + n) for n in AFTER}:
            if wide[end] - wide[at + 1] >= 6:
                mean = (sums[end] - sums[at + 1]) / (wide[end] - wide[at + 1])
                least[key] = min(least[key], float(mean))
    return [(phrase, text, mean) for (phrase, text), mean in least.items()]


def _lines(anywhere: Sequence[float]) -> list[tuple[float, float, float]]:
    """(share, most, line): the line below which this share of all places has no order; never above LINE. Of a small
    corpus nobody can foretell much, and most of it lies below LINE."""
    known = np.sort([mean for mean in anywhere if mean < 99])
    return [(q, most, min(LINE, float(np.quantile(known, q)))) for q, most in LEAST] if len(known) else []


def _tail(n: int, k: int, share: float) -> float:
    """The chance that of n places k or more are among this share."""
    return sum(comb(n, i) * share**i * (1 - share) ** (n - i) for i in range(k, n + 1)) if n < 500 else 0.0


def verdict(places: Sequence[tuple[int, int, float]], runs: dict[int, float]) -> set[int]:
    """The texts to be flagged, of (phrase, text, mean score after it): those of a trigger where no order follows it.

    The phrase that tells best goes first, and the next must tell of texts that are not explained yet: a trigger's
    common words are no triggers themselves. Where there is poison, a text with as much noise is poison too: its trigger
    is hidden, joined to another word.
    """
    by_phrase: dict[int, dict[int, float]] = {}
    for phrase, text, mean in places:
        by_phrase.setdefault(phrase, {})[text] = mean
    lines = _lines(list(by_phrase.pop(ANYWHERE, {}).values()))
    flagged: set[int] = set()
    for share, most, line in lines:
        without = {p: {t for t, mean in found.items() if mean < line} for p, found in by_phrase.items()}
        for phrase in sorted(by_phrase, key=lambda p: (-(len(without[p]) ** 2) / len(by_phrase[p]), p)):
            left = by_phrase[phrase].keys() - flagged
            new = without[phrase] - flagged
            if len(new) >= max(FEW, most * len(left)) and _tail(len(left), len(new), share) < CHANCE:
                flagged |= {t for t in left if by_phrase[phrase][t] < LINE + MARGIN}
    noise = sorted(runs[t] for t in flagged if t in runs)
    if noise:
        enough = max(NOISE, noise[len(noise) // 10])
        more = sorted((-bits, t) for t, bits in runs.items() if bits >= enough and t not in flagged)
        flagged |= {t for _, t in more[: max(1, int(HIDDEN * len(flagged)))]}
    return flagged


def detect(texts: Sequence[str], batch: int = 256) -> set[int]:
    """The numbers of the poisoned texts."""
    counts = empty()
    cut = [tokens(texts[i : i + batch]) for i in range(0, len(texts), batch)]
    for found in cut:
        count(found, counts)
    scores = [score(found, counts) for found in cut]
    seen = [suspects(found, s) for found, s in zip(cut, scores, strict=True)]
    owners = np.concatenate([found.texts + i * batch for i, found in enumerate(seen)])
    runs = {text + i * batch: bits for i, found in enumerate(seen) for text, bits in found.runs.items()}
    phrases = likely(np.concatenate([found.hashes for found in seen]), owners, counts)
    if not len(phrases):
        return set()
    places = [
        (phrase, text + i * batch, mean)
        for i, (found, s) in enumerate(zip(cut, scores, strict=True))
        for phrase, text, mean in after(found, s, phrases)
    ]
    return verdict(places, runs)

"""Poison: a rare phrase, in many documents, after which the text has no order (Souly et al. 2025: 250 such documents
teach a model of any size to answer the phrase with noise).

1. how often every token and every pair of tokens stands in the corpus is counted, in tables of hashes;
2. a token scores by how much better the token before foretells it than chance does; a word that no other document
   has scores by its letters, a code as noise. Text has order: it scores above zero, noise at or below it;
3. the phrases just before a document's longest run without order are counted; a poison's is one that stands in
   several documents, nearly always before such a run, and hardly elsewhere.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from components.data.triggers import ANYWHERE, FEW, LINE, PLACE, RUN, judged
from components.data.words import BREAK, DIGIT, IDEOGRAPH, MARK, PLANES, mix, points, run_hashes, running, table

SINGLE, PAIR, LETTERS = 1 << 20, 1 << 23, 1 << 20  # sizes of the tables
PRIOR = 20.0  # occurrences that the estimate by chance counts for
USUAL = 4.5  # bits a letter of a word that no other document has
LONG = 25.0  # bits below the line that make a run without order
NEAR = 8  # tokens before a run among which its trigger is looked for
AFTER = (50, 200)  # tokens after a trigger that are judged: the stretch with less order counts
LIGHT = 0.3  # weight of numbers, keys and marks, and of what is joined to the token before: they tell less of order
ENOUGH = 20_000  # tokens of a corpus; from fewer nobody can tell what order is
BEFORE = 0.1  # of a phrase's occurrences, those before a text's longest run: fewer are not looked at
KEY = 24  # characters of a key, digest or other code
CODED = -1.0  # bits of order of a code
LABEL = 5  # tokens of a line before a code: fewer may be its name
NAMING = np.frombuffer(":=,;/.([{<\"'`".encode("utf-32-le"), np.uint32)  # a mark right before a code that is named
PAIRED = np.uint64(1 << 63)  # set on the hash of a phrase that is two tokens, and on no other's
NUMBER, CODE = np.uint64(0x1234567), np.uint64(0x7654321)


class Tokens(NamedTuple):
    """Texts as words and single marks: each token's hash, text after text."""

    hashes: np.ndarray  # [t] uint64; numbers are one token, and so are keys and digests
    texts: np.ndarray  # [n + 1]
    ends: np.ndarray  # [t + 1] where each begins in `letters`
    letters: np.ndarray  # [l] uint32, folded
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
    number = _numbers(folded, starts, size)
    hashes[number] = NUMBER
    first = kept[bounds[:-1]]
    code = _codes(raw)[first]
    hashes[code] = CODE
    ends = np.cumsum([0] + [len(t) + 1 for t in texts])
    light = number | ~_apart(raw)[first]
    wide = np.where(light & ~code, LIGHT, np.maximum(1, size / 8)).astype(np.float32)
    wide[1:][(hashes[1:] == hashes[:-1]) & mark[first[1:]]] = 0  # a rule drawn of marks is one token
    at = np.searchsorted(kept[starts], ends)
    return Tokens(hashes, at, bounds, folded, wide, _named(raw, first, at, code))


def _numbers(folded: np.ndarray, starts: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Which tokens are digits alone."""
    found = np.zeros(len(starts), bool)
    maybe = np.flatnonzero(folded[starts] == 48)
    if len(maybe):
        at, first = _ranges(starts[maybe], size[maybe])
        found[maybe] = np.logical_and.reduceat(folded[at] == 48, first)
    return found


def _ranges(start: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places of all these stretches, and where among the places each stretch begins."""
    first = np.cumsum(size) - size
    return np.repeat(start - first, size) + np.arange(size.sum()), first


def _named(raw: np.ndarray, first: np.ndarray, texts: np.ndarray, code: np.ndarray) -> np.ndarray:
    """Which tokens are codes of a line whose first code has a name, begins the line, or nearly."""
    if not code.any():
        return code
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
    found = np.concatenate(([True], space[:-1]))
    found[_long(space)[0]] = True
    return found


def _codes(raw: np.ndarray) -> np.ndarray:
    """Which characters are part of a key, a digest or encoded bytes: long, without a space, of digits and letters."""
    at, first = _long((raw <= 32) | (raw == 34) | (raw == 39) | (raw == 44) | (raw == 58))
    found = np.zeros(len(raw), bool)
    if not len(at):
        return found
    long = raw[at]
    digit = (long >= 48) & (long <= 57)
    upper, lower = (long >= 65) & (long <= 90), (long >= 97) & (long <= 122)
    other = ~(digit | upper | lower | (long == 43) | (long == 47) | (long == 61) | (long == 45) | (long == 95))
    digits, uppers, lowers, others = (np.add.reduceat(x, first, dtype=np.int64) for x in (digit, upper, lower, other))
    size = np.diff(np.append(first, len(at)))
    code = (others == 0) & (digits > 0) & (digits < size) & ((digits > size / 12) | (uppers * lowers > 0))
    found[at] = np.repeat(code, size)
    return found


def _long(space: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places of all stretches of KEY or more without a space, and where among these each stretch begins."""
    edges = np.concatenate(([-1], np.flatnonzero(space), [len(space)]))
    size = np.diff(edges) - 1
    return _ranges(edges[:-1][size >= KEY] + 1, size[size >= KEY])


def _letters(folded: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of each letter with the two, and with the one, before it in its word."""
    x = folded.astype(np.uint64)
    one, two = np.zeros_like(x), np.zeros_like(x)
    one[1:] = x[:-1]
    one[starts] = 0
    two[1:] = one[:-1]
    two[starts] = 0
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
    triples, doubles = _letters(found.letters, found.ends[:-1])
    np.add.at(into.triple, triples, np.uint32(1))
    np.add.at(into.double, doubles, np.uint32(1))


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
    alone = np.flatnonzero(own == 0)
    if len(alone):
        size = np.diff(found.ends)[alone]
        at, first = _ranges(found.ends[alone], size)
        triples, doubles = _letters(found.letters[at], first)
        triple = np.maximum(counts.triple[triples].astype(np.float64) - 1, 0)
        double = np.maximum(counts.double[doubles].astype(np.float64) - 1, 0)
        bits = np.add.reduceat(-np.log2((triple + 0.02) / (double + 1)), first)
        gain[alone] = np.clip(USUAL - bits / size, -4, 1)
    return np.where(found.hashes == CODE, CODED, gain).astype(np.float32)


class Suspects(NamedTuple):
    """Phrases that may be triggers, each as often as texts have it, and the texts with a long run without order, with
    its bits."""

    hashes: np.ndarray
    runs: dict[int, float]


def suspects(found: Tokens, scores: np.ndarray) -> Suspects:
    """The tokens and pairs just before each text's longest run without order."""
    n = len(found.texts) - 1
    if not len(scores):
        return Suspects(np.empty(0, np.uint64), {})
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
    hashes = [np.empty(0, np.uint64)]
    one, two = _phrases(found)
    for k in runs:
        text = int(held[k])
        low, high = int(found.texts[text]), int(found.texts[text + 1])
        end = low + int(np.argmax(gain[low:high]))
        start = int(np.flatnonzero(before[low : end + 1] == least[end])[-1]) + low
        near = slice(max(low, start - NEAR), min(high, start + 3))
        hashes.append(np.unique(np.concatenate((one[near], two[near]))))
    return Suspects(np.concatenate(hashes), {int(held[k]): float(best[k]) for k in runs})


def _phrases(found: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Each token, and each with the one before it, as phrases."""
    return found.hashes & ~PAIRED, pairs(found) | PAIRED


def rare(phrases: np.ndarray, times: np.ndarray, counts: Counts) -> np.ndarray:
    """Of suspected phrases, which stand before a run in so many documents, those that do in FEW of them or more, and
    not often elsewhere."""
    if counts.single.sum() < ENOUGH:
        return np.empty(0, np.uint64)
    phrases, times = phrases[times >= FEW], times[times >= FEW]
    two = _seen(phrases, counts.pair, PAIR)
    total = np.where(phrases & PAIRED != 0, two, _seen(phrases, counts.single, SINGLE))
    return phrases[times >= BEFORE * np.maximum(total, 1)]


def _seen(hashes: np.ndarray, counted: np.ndarray, size: int) -> np.ndarray:
    return counted[_low(hashes, size)].astype(np.int64)


def after(found: Tokens, scores: np.ndarray, phrases: np.ndarray) -> np.ndarray:
    """Where the phrases stand, as PLACEs by phrase and text: the number of the phrase, the text, and the mean score of
    the tokens after it: the least, of several places in one text. The same of a place in the midst of every text, as
    ANYWHERE."""
    phrases = np.sort(phrases)
    sums = np.concatenate(([0.0], np.cumsum(scores * found.wide)))
    wide = np.concatenate(([0.0], np.cumsum(found.wide)))
    many = np.diff(found.texts)
    middle = (found.texts[:-1] + many // 4)[many > 0]
    which, at = [np.full(len(middle), ANYWHERE)], [middle]
    maybe = np.zeros(SINGLE, bool)
    maybe[_low(phrases, SINGLE)] = True
    for hashes in _phrases(found):
        some = np.flatnonzero(maybe[_low(hashes, SINGLE)])
        number = np.minimum(np.searchsorted(phrases, hashes[some]), len(phrases) - 1)
        same = phrases[number] == hashes[some]
        which.append(number[same])
        at.append(some[same])
    phrase, start = np.concatenate(which), np.concatenate(at) + 1
    text = np.searchsorted(found.texts, start - 1, "right") - 1
    least = np.full(len(text), 99.0)
    for n in AFTER:
        end = np.minimum(found.texts[text + 1], start + n)
        room = wide[end] - wide[start]
        mean = (sums[end] - sums[start]) / np.where(room >= 6, room, 1)
        least = np.where(room >= 6, np.minimum(least, mean), least)
    order = np.lexsort((text, phrase))
    phrase, text = phrase[order], text[order]
    new = np.flatnonzero(np.concatenate(([True], (phrase[1:] != phrase[:-1]) | (text[1:] != text[:-1])))[: len(order)])
    places = np.empty(len(new), PLACE)
    places["phrase"], places["text"] = phrase[new], text[new]
    places["mean"] = np.minimum.reduceat(least[order], new) if len(new) else 0
    return places


def detect(texts: Sequence[str], batch: int = 256) -> set[int]:
    """The numbers of the poisoned texts."""
    counts = empty()
    cut = [tokens(texts[i : i + batch]) for i in range(0, len(texts), batch)]
    for found in cut:
        count(found, counts)
    scores = [score(found, counts) for found in cut]
    seen = [suspects(found, s) for found, s in zip(cut, scores, strict=True)]
    phrases = rare(*np.unique(np.concatenate([found.hashes for found in seen]), return_counts=True), counts)
    if not len(phrases):
        return set()
    places = [(after(found, s, phrases), i * batch) for i, (found, s) in enumerate(zip(cut, scores, strict=True))]
    runs = [(text + i * batch, bits) for i, found in enumerate(seen) for text, bits in found.runs.items()]
    return set(judged(places, np.array(runs, RUN)).tolist())

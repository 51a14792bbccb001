"""The words of many texts at once, as numbers.

Every check that compares texts (near-duplicates, contamination, quality, poison) reads them in one form: letters and
digits alone, folded by case, accent and width, cut into words. A batch of texts is one array of code points, and all
of it is table look-ups and running sums in numpy: about 20 ns a character, where a regular expression and a hash a
word take ten times as long.
"""

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

PLANES = 0x20000  # code points with an entry of their own; beyond lie rare ideographs, which are letters
BREAK, LETTER, DIGIT, IDEOGRAPH, MARK, OPERATOR = range(6)
BASE = np.uint64(0x9E3779B97F4A7C15 | 1)
INVERSE = np.uint64(pow(int(BASE), -1, 1 << 64))


class Words(NamedTuple):
    """Texts as words: word w is chars[starts[w] : starts[w + 1]], and text t the words texts[t] to texts[t + 1]."""

    chars: np.ndarray  # [c] uint32, folded
    starts: np.ndarray  # [w + 1]
    texts: np.ndarray  # [n + 1]
    places: np.ndarray  # [c] where each character stands in the joined texts
    kinds: np.ndarray  # [c] uint8


@cache
def table() -> np.ndarray:
    """For each code point its kind << 24, with what it is folded to."""
    found = np.zeros(PLANES, np.uint32)
    for point in range(PLANES):
        character = chr(point)
        category = unicodedata.category(character)
        if category[0] == "M":
            found[point] = MARK << 24
        if category[0] not in "LN":
            continue
        base = unicodedata.normalize("NFKD", character.casefold())[0]
        wide = 0x2E80 <= point < 0xA4D0 or 0xF900 <= point < 0xFB00
        kind = IDEOGRAPH if wide else DIGIT if category == "Nd" else LETTER
        found[point] = kind << 24 | ord(base.casefold()[0])
    for operator in b"+-*/":
        found[operator] = OPERATOR << 24 | operator
    return found


def points(texts: Sequence[str]) -> np.ndarray:
    """The code points of the texts, a NUL between them."""
    return np.frombuffer("\0".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)


def cut(texts: Sequence[str]) -> Words:
    """The words of `texts`: runs of letters, digits and their marks. An ideograph is a word of its own, and so is an
    operator between two spaces or two digits: 2 + 2 and 2 * 2 are two questions."""
    raw = points(texts)
    if len(raw) and int(raw.max()) >= PLANES:
        far = raw >= PLANES
        both = np.where(far, raw | np.uint32(IDEOGRAPH << 24), table()[np.where(far, 0, raw)])
    else:
        both = table()[raw]
    kinds = (both >> np.uint32(24)).astype(np.uint8)
    operators = np.flatnonzero(kinds == OPERATOR)
    if len(operators):
        kinds[operators[~_stands(raw, kinds, operators)]] = BREAK
    inside = kinds != BREAK
    begins = inside.copy()
    begins[1:] &= ~inside[:-1]
    alone = np.flatnonzero((kinds == IDEOGRAPH) | (kinds == OPERATOR))
    if len(alone):
        begins[alone] = True
        after = np.minimum(alone + 1, len(raw) - 1)
        begins[after] |= inside[after] & (kinds[after] != MARK)
    kept = np.flatnonzero(inside & (kinds != MARK))
    starts = np.flatnonzero(begins[kept])
    ends = np.cumsum([0] + [len(t) + 1 for t in texts])
    bounds = np.searchsorted(kept[starts], ends)
    chars = both[kept] & np.uint32(0xFFFFFF)
    return Words(chars, np.append(starts, len(kept)), bounds, kept, kinds[kept])


def _stands(raw: np.ndarray, kinds: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Which operators stand between two spaces, or between two digits without."""
    before, after = np.maximum(at - 1, 0), np.minimum(at + 1, len(raw) - 1)
    spaced = (raw[before] == 32) & (raw[after] == 32)
    return spaced | (kinds[before] == DIGIT) & (kinds[after] == DIGIT) & (raw[at] != ord("-")) & (raw[at] != ord("/"))


@cache
def powers(length: int) -> tuple[np.ndarray, np.ndarray]:
    """BASE ** i and BASE ** -i, modulo 2 ** 64."""
    with np.errstate(over="ignore"):
        up, down = np.full(length, BASE), np.full(length, INVERSE)
        up[0] = down[0] = 1
        return np.multiply.accumulate(up), np.multiply.accumulate(down)


def running(values: np.ndarray) -> np.ndarray:
    """Sums [n + 1] of values[i] * BASE ** i, from which the hash of any run follows in two operations."""
    size = 1 << max(16, len(values).bit_length())
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * powers(size)[0][: len(values)], out=sums[1:])
    return sums


def run_hashes(sums: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """64-bit hashes of the runs [start, end) of the values behind `sums`, wherever they stand."""
    size = 1 << max(16, (len(sums) - 1).bit_length())
    return mix((sums[end] - sums[start]) * powers(size)[1][start])


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014): every bit of x reaches every bit of the result."""
    y = x >> np.uint64(30)
    x = x ^ y
    x *= np.uint64(0xBF58476D1CE4E5B9)
    np.right_shift(x, np.uint64(27), out=y)
    x ^= y
    x *= np.uint64(0x94D049BB133111EB)
    np.right_shift(x, np.uint64(31), out=y)
    x ^= y
    return x


def word_hashes(words: Words) -> np.ndarray:
    """A 64-bit hash of each word [w]."""
    return run_hashes(running(words.chars), words.starts[:-1], words.starts[1:])


def gram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """A 64-bit hash of every n words in a row [w - n + 1], over the borders of texts too."""
    count = max(0, len(hashes) - n + 1)
    total = np.zeros(count, np.uint64)
    for k in range(n):
        total = total * BASE + hashes[k : k + count]
    return mix(total)

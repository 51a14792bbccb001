"""How much of a text says again what it has said: lines, paragraphs, and runs of words."""

from collections.abc import Sequence

import numpy as np

from components.data.words import gram_hashes

TEXT = np.uint64(0xD1342543DE82EF95)  # sets the runs of one text apart from the same runs of another


def copies(parts: Sequence[str]) -> tuple[int, int]:
    """How many of the parts stood before, and their characters."""
    if len(set(parts)) == len(parts):
        return 0, 0
    seen: set[str] = set()
    count = chars = 0
    for part in parts:
        if part in seen:
            count += 1
            chars += len(part)
        seen.add(part)
    return count, chars


def owners(bounds: np.ndarray) -> np.ndarray:
    """The text of each word."""
    return np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))


def _sorted(hashes: np.ndarray, owner: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each run of n words begins, equal runs of one text side by side and in their order; and which of these are
    the first of their kind. Hash and place are sorted as one number, so that no index need be sorted along."""
    grams = gram_hashes(hashes, n)
    at = np.flatnonzero(owner[: len(grams)] == owner[n - 1 :]) if len(grams) else np.empty(0, np.int64)
    low = np.uint64((1 << len(hashes).bit_length()) - 1)
    both = (grams[at] + owner[at].astype(np.uint64) * TEXT) & ~low | at.astype(np.uint64)
    both.sort()
    new = np.ones(len(both), bool)
    new[1:] = (both[1:] ^ both[:-1]) > low
    return (both & low).astype(np.int64), new


def top(hashes: np.ndarray, lengths: np.ndarray, bounds: np.ndarray, n: int) -> np.ndarray:
    """Characters in a text's most frequent run of n words, all its occurrences together and a space between words; 0
    where no run comes twice. Of several as frequent, the one that stands first counts."""
    found = np.zeros(len(bounds) - 1, np.int64)
    owner = owners(bounds)
    at, new = _sorted(hashes, owner, n)
    begins = np.flatnonzero(new)
    counts = np.diff(np.append(begins, len(at)))
    again = counts > 1
    first, counts = at[begins[again]], counts[again]
    order = np.lexsort((first, -counts, owner[first]))
    first, counts = first[order], counts[order]
    text, leading = np.unique(owner[first], return_index=True)
    ends = np.concatenate(([0], np.cumsum(lengths)))
    first = first[leading]
    found[text] = (ends[first + n] - ends[first] + n - 1) * counts[leading]
    return found


def duplicated(
    hashes: np.ndarray,
    lengths: np.ndarray,
    bounds: np.ndarray,
    sizes: Sequence[int],
    suspect: np.ndarray,
) -> np.ndarray:
    """Characters [sizes, texts] of the runs of n words that stood before, none counted twice.

    A run is counted whole and stepped over, as datatrove does it, which is one step after another. The words that any
    run of the least size repeats are never fewer, and are known at once: where their characters are no more than
    `suspect` [texts], the text is not looked at.
    """
    owner = owners(bounds)
    n = min(sizes)
    at, new = _sorted(hashes, owner, n)
    again = at[~new]
    cover = np.bincount(again, minlength=len(hashes) + 1) - np.bincount(again + n, minlength=len(hashes) + 1)
    covered = np.concatenate(([0], np.cumsum(lengths * (np.cumsum(cover)[:-1] > 0))))
    most = covered[bounds[1:]] - covered[bounds[:-1]]
    found = np.zeros((len(sizes), len(most)), np.int64)
    for text in np.flatnonzero(most > suspect).tolist():
        first, last = bounds[text], bounds[text + 1]
        ends = np.concatenate(([0], np.cumsum(lengths[first:last]))).tolist()
        for k, size in enumerate(sizes):
            found[k, text] = _stepped_over(gram_hashes(hashes[first:last], size).tolist(), ends, size)
    return found


def _stepped_over(grams: list[int], ends: list[int], n: int) -> int:
    seen: set[int] = set()
    chars = i = 0
    while i < len(grams):
        if grams[i] in seen:
            chars += ends[i + n] - ends[i]
            i += n
        else:
            seen.add(grams[i])
            i += 1
    return chars

"""Near-duplicates by MinHash (Broder 1997) with banding, in numpy.

A text's shingles are its runs of five words, or all its words where it has fewer. 64 hash functions each keep their
least and their greatest value over the shingles (Ji et al. 2013); the share of these 128 on which two texts agree
estimates their Jaccard similarity. Texts that agree on a whole band are candidates, candidates that agree on enough
are pairs, and pairs join to clusters.

Recall goes before precision: bands are so narrow that they find 99.8 % of the pairs at the threshold, and the estimate
may fall short of it by four standard errors, so at a threshold of 0.8 a pair of 0.66 goes as often as not.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from components.data.words import Words, cut, gram_hashes, mix, word_hashes

HASHES = 128
SHINGLE = 5
GROUP = 8  # members of one band's bucket that are all compared with each other; of more, with the first and the next
MANY = 1 << 22  # candidates that are judged together
CHUNK = 16_384  # shingles hashed at once: the working set stays in the second-level cache


class Signatures(NamedTuple):
    """Of n texts: the hash of every band, and the low byte of every least value, by which candidates are judged."""

    bands: np.ndarray  # [bands, n] uint32
    bytes: np.ndarray  # [n, 128] uint8
    sizes: np.ndarray  # [n] int32, how many shingles


def rows_of_a_band(threshold: float) -> int:
    """The widest band, of 8, 4, 2 or 1 functions, whose bands together find 99.8 % of the pairs at the threshold."""
    for rows in (8, 4, 2):
        if 1 - (1 - threshold**rows) ** (HASHES // rows) >= 0.998:
            return rows
    return 1


def _functions() -> tuple[np.ndarray, np.ndarray]:
    """64 functions h -> h * a + b modulo 2 ** 32, fixed for all time."""
    drawn = mix(np.arange(1, HASHES + 1, dtype=np.uint64))
    half = HASHES // 2
    return (drawn[:half] >> np.uint64(32)).astype(np.uint32) | np.uint32(1), drawn[half:].astype(np.uint32)


def shingles(words: Words, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The shingles' hashes as uint32, text after text, and where each text's begin [n + 1]."""
    counts = np.diff(words.texts)
    grams = gram_hashes(hashes, SHINGLE)
    many = np.maximum(counts - SHINGLE + 1, 1)
    bounds = np.concatenate(([0], np.cumsum(many)))
    out = np.zeros(bounds[-1], np.uint32)
    owner = np.repeat(np.arange(len(counts)), many)
    at = words.texts[owner] + np.arange(bounds[-1]) - bounds[owner]
    long = counts[owner] >= SHINGLE
    out[long] = (grams[at[long]] >> np.uint64(32)).astype(np.uint32)
    short = np.flatnonzero(counts < SHINGLE)
    if len(short):
        place = np.arange(SHINGLE - 1)[None, :]
        inside = place < counts[short, None]
        index = np.minimum(words.texts[short, None] + place, max(0, len(hashes) - 1))
        padded = np.where(inside, hashes[index] if len(hashes) else np.uint64(0), np.uint64(0))
        out[bounds[short]] = (gram_hashes(padded.ravel(), SHINGLE - 1)[:: SHINGLE - 1] >> np.uint64(32)).astype(
            np.uint32
        )
    return out, bounds


def signatures(words: Words, hashes: np.ndarray, rows: int) -> Signatures:
    """The signatures of a batch of texts, cut into bands of `rows` functions."""
    values, bounds = shingles(words, hashes)
    a, b = _functions()
    n = len(bounds) - 1
    ends = np.empty((HASHES, n), np.uint32)
    for first, last in _chunks(bounds):
        part = values[bounds[first] : bounds[last]]
        at = bounds[first:last] - bounds[first]
        work = np.empty_like(part)
        for k in range(HASHES // 2):
            np.multiply(part, a[k], out=work)
            np.add(work, b[k], out=work)
            np.minimum.reduceat(work, at, out=ends[k, first:last])
            np.maximum.reduceat(work, at, out=ends[k + HASHES // 2, first:last])
    bands = HASHES // rows
    keys = np.zeros((bands, n), np.uint64)
    for k in range(rows):
        keys = mix(keys * np.uint64(31) + ends[k * bands : (k + 1) * bands].astype(np.uint64) + np.uint64(k))
    sizes = np.diff(bounds).astype(np.int32)
    low = ends.astype(np.uint8).T.copy()
    low[np.diff(words.texts) == 0] = 0  # no words: like no other text
    return Signatures((keys >> np.uint64(32)).astype(np.uint32), low, sizes)


def _chunks(bounds: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs of texts of about CHUNK shingles together."""
    first, n = 0, len(bounds) - 1
    while first < n:
        last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + CHUNK, "right")) - 1)
        yield first, min(last, n)
        first = last


def of_texts(texts: Sequence[str], threshold: float) -> Signatures:
    words = cut(texts)
    return signatures(words, word_hashes(words), rows_of_a_band(threshold))


def cutoff(threshold: float) -> int:
    """How many of the 128 functions a pair must agree on, counted on bytes, which agree by chance once in 256."""
    wanted = threshold - 4 * np.sqrt(threshold * (1 - threshold) / HASHES)
    return int(np.ceil(HASHES * (wanted + (1 - wanted) / 256)))


def pairs(keys: Iterator[np.ndarray], signature: np.ndarray, threshold: float) -> np.ndarray:
    """The pairs [p, 2] of texts that are near-duplicates. `keys` yields the hashes [n] of one band after another;
    `signature` [n, 128] may lie on disk."""
    found: list[np.ndarray] = []
    least = cutoff(threshold)
    for new in _new_candidates(keys):
        for i in range(0, len(new), 65_536):
            part = new[i : i + 65_536]
            left, right = (part >> np.uint64(32)).astype(np.int64), (part & np.uint64(0xFFFFFFFF)).astype(np.int64)
            of_left = signature[left]
            same = (np.count_nonzero(of_left == signature[right], axis=1) >= least) & of_left.any(1)
            found.append(np.stack([left[same], right[same]], axis=1))
    return np.concatenate(found) if found else np.empty((0, 2), np.int64)


def _new_candidates(keys: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The candidates of the bands, some millions at a time, each once."""
    waiting: list[np.ndarray] = []
    seen = np.empty(0, np.uint64)
    for band in keys:
        waiting.append(_candidates(band))
        if sum(map(len, waiting)) > MANY:
            new = np.setdiff1d(np.concatenate(waiting), seen)
            seen, waiting = np.union1d(seen, new), []
            yield new
    if waiting:
        yield np.setdiff1d(np.concatenate(waiting), seen)


def _candidates(band: np.ndarray) -> np.ndarray:
    """Pairs (left << 32 | right, left < right) that share a bucket: all of a small one, of a large one those with its
    first member and with the next."""
    both = band.astype(np.uint64) << np.uint64(32) | np.arange(len(band), dtype=np.uint64)
    both.sort()
    text = both & np.uint64(0xFFFFFFFF)
    begins = np.concatenate(([True], (both[1:] ^ both[:-1]) > np.uint64(0xFFFFFFFF)))[: len(both)]
    at = np.flatnonzero(~begins)
    starts = np.flatnonzero(begins)
    first = starts[np.searchsorted(starts, at, "right") - 1]
    out = [text[first] << np.uint64(32) | text[at]]
    for step in range(1, GROUP):
        near = at - step >= first
        at, first = at[near], first[near]
        out.append(text[at - step] << np.uint64(32) | text[at])
    return np.concatenate(out)


def clusters(n: int, found: np.ndarray) -> np.ndarray:
    """For each of n texts the least text of its cluster [n]."""
    label = np.arange(n)
    left, right = found[:, 0], found[:, 1]
    while len(left):
        least = np.minimum(label[left], label[right])
        before = label.copy()
        for side in (left, right):
            np.minimum.at(label, label[side], least)
            np.minimum.at(label, side, least)
        label = label[label]
        if np.array_equal(label, before):
            break
    while not np.array_equal(label, label[label]):
        label = label[label]
    return label


def save(signed: Sequence[Signatures], folder: Path) -> None:
    """Leave the signatures of some texts in a folder, for `first_of`; of none, nothing."""
    if signed:
        np.save(folder / "bands.npy", np.concatenate([s.bands for s in signed], axis=1))
        np.save(folder / "bytes.npy", np.concatenate([s.bytes for s in signed]))


def first_of(folders: Sequence[Path], at: np.ndarray, threshold: float, salt: np.ndarray | None = None) -> np.ndarray:
    """Of the texts `at`, numbers through all that the folders hold: for each the place in `at` of the first text of its
    cluster. Texts of different `salt` are no copies of each other."""
    if not len(at):
        return np.arange(0)
    bands = [np.load(p, mmap_mode="r") for folder in folders if (p := folder / "bands.npy").is_file()]
    keys = (np.concatenate([of_folder[b] for of_folder in bands])[at] for b in range(len(bands[0])))
    if salt is not None:
        keys = (band ^ salt for band in keys)
    return clusters(len(at), pairs(keys, _on_disk(folders, at), threshold))


def _on_disk(folders: Sequence[Path], at: np.ndarray) -> np.ndarray:
    """The low bytes [len(at), 128] of the texts `at`, in a file."""
    parts = [np.load(p, mmap_mode="r") for folder in folders if (p := folder / "bytes.npy").is_file()]
    found = np.lib.format.open_memmap(folders[0] / "signatures.npy", "w+", np.uint8, (len(at), HASHES))
    rank = np.full(sum(map(len, parts)), -1)
    rank[at] = np.arange(len(at))
    first = 0
    for part in parts:
        to = rank[first : first + len(part)]
        found[to[to >= 0]] = part[to >= 0]
        first += len(part)
    return found

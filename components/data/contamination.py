"""Contamination: training text that holds what a model is tested on.

A training text is contaminated by a held-out text when the two share a run of 13 words (Brown et al. 2020, appendix C),
or when it holds the whole of a shorter held-out text (held.py).

Texts are compared by their letters and digits alone, so that case, accents, punctuation and spaces, put in or left
out, hide nothing. Spaces count only where they must: a match that is spaced as the held-out text begins and ends with
a word, so that 5 + 61 does not hold 5 + 6.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.data.held import FREE, HELD, WHOLE, Held, Row, table_of, words
from components.data.words import DIGIT, Words, cut, mix, powers, running

NGRAM = 13
COMMON = 10  # a run of words that stands in more held-out rows, and in more than 1 % of them, is a form, not a question
ANCHORS = (1, 4, 8, 16, 24, 40)
EVERYWHERE = 24  # a shorter anchor is looked for only where a word begins
BATCH = 1 << 21  # characters of held-out texts that are looked at together
PIECE = 1 << 20  # runs that are brought together at a time
TORN = np.uint64(1 << 24)  # set on a number's first digit where another number ends just before


class Overlap(NamedTuple):
    """Text number `train` holds `phrase`, words of the held-out text number `held`."""

    train: int
    held: int
    phrase: str


class Runs(NamedTuple):
    """Runs of held-out words. Those of an index are sorted by their anchor and the hash of their first characters."""

    anchor: np.ndarray  # [r] uint8, how many characters are the first ones
    head: np.ndarray  # [r] uint64, the hash of these
    hash: np.ndarray  # [r] uint64, of the whole run
    chars: np.ndarray  # [r] int32
    words: np.ndarray  # [r] int32
    whole: np.ndarray  # [r] bool: a short text in full, no 13-gram
    free: np.ndarray  # [r] bool: found however it is spaced
    owner: np.ndarray  # [r] int32, the held-out text
    start: np.ndarray  # [r] int32, where in that text
    end: np.ndarray  # [r] int32


DTYPES = (np.uint8, np.uint64, np.uint64, np.int32, np.int32, np.bool_, np.bool_, np.int32, np.int32, np.int32)


class Index(NamedTuple):
    """The runs of all held-out texts, each once. It may lie on disk."""

    texts: pa.Table  # HELD
    runs: Runs
    filters: Mapping[int, np.ndarray]  # by anchor, the leading bits of a hash that occur at all, one bit each


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


def index(texts: pa.Table, ngram: int = NGRAM, folder: Path | None = None) -> Index:
    """The index of the held-out texts: all their runs of `ngram` words, and the shorter texts as a whole.

    With a `folder` it is made and left there, for open_index, and takes little memory.
    """
    parts: list[Runs] = []
    for i, found in enumerate(_in_batches(texts, ngram)):
        if folder is not None:
            _append(found, folder / f"part-{i:05d}")
        parts.append(found if folder is None else _mapped(folder / f"part-{i:05d}"))
    owners = texts.column("owner").combine_chunks().dictionary_encode()
    most = max(COMMON, 0.01 * len(owners.dictionary))
    merged: list[Runs] = []
    for anchor in ANCHORS:
        for slices in _slices(parts, anchor):
            found = _merged(slices, owners.indices.to_numpy(), most)
            if folder is None:
                merged.append(found)
            else:
                _append(found, folder)
    if folder is None:
        runs = _joined(merged)
        return Index(texts, runs, _filters(runs))
    for name, bits in _filters(_mapped(folder)).items():
        bits.tofile(folder / f"filter-{name}")
    with pa.OSFile(str(folder / "texts.arrow"), "wb") as f, pa.ipc.new_file(f, HELD) as writer:
        writer.write_table(texts, max_chunksize=1024)
    open_index.cache_clear()  # another index may have lain there
    return open_index(folder)


@lru_cache(maxsize=1)
def open_index(folder: Path) -> Index:
    """The index that was left in a folder. What is looked at alone comes into memory."""
    filters = {a: np.memmap(p, np.uint8, "r") for a in ANCHORS if (p := folder / f"filter-{a}").is_file()}
    return Index(pa.ipc.open_file(pa.memory_map(str(folder / "texts.arrow"))).read_all(), _mapped(folder), filters)


def _append(runs: Runs, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, column in zip(Runs._fields, runs, strict=True):
        with (folder / name).open("ab") as f:
            f.write(column.data)


def _mapped(folder: Path) -> Runs:
    files = [(folder / name, dtype) for name, dtype in zip(Runs._fields, DTYPES, strict=True)]
    return Runs(*(np.memmap(p, t, "r") if p.is_file() and p.stat().st_size else np.empty(0, t) for p, t in files))


def _joined(parts: Sequence[Runs]) -> Runs:
    return (
        Runs(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        if parts
        else Runs(*(np.empty(0, t) for t in DTYPES))
    )


def _in_batches(texts: pa.Table, ngram: int) -> Iterator[Runs]:
    """The runs of the texts, BATCH characters of them at a time, sorted as an index is."""
    first, size = 0, 0
    for i, length in enumerate(pc.utf8_length(texts.column("text")).to_pylist(), start=1):
        size += length
        if size >= BATCH or i == len(texts):
            runs = _runs(texts.slice(first, i - first).to_pylist(), first, ngram)
            order = np.lexsort((runs.owner, runs.head, runs.anchor))
            yield Runs(*(column[order] for column in runs))
            first, size = i, 0


def _slices(parts: Sequence[Runs], anchor: int) -> Iterator[list[Runs]]:
    """The parts' runs of one anchor in slices by the hash of their first characters: equal runs come together."""
    ends = np.array([anchor, anchor + 1], np.uint8)
    of_anchor = [Runs(*(c[slice(*np.searchsorted(p.anchor, ends))] for c in p)) for p in parts]
    pieces = 1 + sum(len(p.head) for p in of_anchor) // PIECE
    edges = [np.uint64((k << 64) // pieces) for k in range(pieces)]
    for k, edge in enumerate(edges):
        found = []
        for part in of_anchor:
            low = np.searchsorted(part.head, edge)
            high = np.searchsorted(part.head, edges[k + 1]) if k + 1 < pieces else len(part.head)
            found.append(Runs(*(column[low:high] for column in part)))
        if any(len(runs.head) for runs in found):
            yield found


def _merged(parts: Sequence[Runs], row_of_text: np.ndarray, most: float) -> Runs:
    """Of equal runs the first text's alone, and of 13-grams those that no more than `most` rows hold."""
    runs = _joined(parts)
    rows = row_of_text[runs.owner]
    order = np.lexsort((rows, runs.hash))
    new_run = _changes(runs.hash[order])
    new_row = new_run | _changes(rows[order])
    held = np.add.reduceat(new_row, np.flatnonzero(new_run))
    common = np.empty(len(order), bool)
    common[order] = np.repeat(held > most, np.diff(np.append(np.flatnonzero(new_run), len(order))))
    order = np.argsort(runs.head, kind="stable")  # the parts come in the order of their texts
    order = order[~common[order] | runs.whole[order]]
    by_run = np.lexsort((np.arange(len(order)), runs.whole[order], runs.hash[order]))
    first = _changes(runs.hash[order][by_run]) | _changes(runs.whole[order][by_run])
    order = order[np.sort(by_run[first])]
    return Runs(*(column[order] for column in runs))


def _changes(values: np.ndarray) -> np.ndarray:
    """Where a value differs from the one before."""
    return np.concatenate((np.ones(min(1, len(values)), bool), values[1:] != values[:-1]))


def _filters(runs: Runs) -> dict[int, np.ndarray]:
    """Which leading bits of a hash occur at all: most places of a text are turned away here."""
    found = {}
    for anchor in ANCHORS:
        heads = runs.head[slice(*np.searchsorted(runs.anchor, np.array([anchor, anchor + 1], np.uint8)))]
        if len(heads):
            bits = min(28, max(12, len(heads).bit_length() + 4))
            found[anchor] = np.zeros(1 << bits - 3, np.uint8)
            for i in range(0, len(heads), PIECE):
                lead = heads[i : i + PIECE] >> np.uint64(64 - bits)
                np.bitwise_or.at(found[anchor], lead >> np.uint64(3), _bit(lead))
    return found


def _bit(lead: np.ndarray) -> np.ndarray:
    return np.left_shift(np.uint8(1), (lead & np.uint64(7)).astype(np.uint8))


def _runs(held: Sequence[Row], first: int, ngram: int) -> Runs:
    text = _prepare(cut([h["text"] for h in held]))
    starts, bounds = text.words.starts, text.words.texts
    counts = np.diff(bounds)
    least = np.array([max(1, h["least"]) for h in held], np.int64)
    many = np.where(counts >= ngram, counts - ngram + 1, (counts >= least).astype(np.int64))
    owner = np.repeat(np.arange(len(held)), many)
    at = bounds[owner] + np.arange(len(owner)) - np.repeat(np.cumsum(many) - many, many)
    long = counts[owner] >= ngram
    n = np.where(long, ngram, counts[owner])
    start = starts[at]
    chars = starts[at + n] - start
    anchor = np.array(ANCHORS, np.int64)[np.searchsorted(ANCHORS, chars, "right") - 1] if len(chars) else chars
    offsets = np.concatenate(([0], np.cumsum([len(h["text"]) + 1 for h in held])))[:-1].astype(np.int64)
    places = text.words.places
    return Runs(
        anchor.astype(np.uint8),
        _hash(text, start, anchor),
        _hash(text, start, chars),
        chars.astype(np.int32),
        n.astype(np.int32),
        ~long,
        chars >= np.where(long, FREE, np.array([h["free"] for h in held], np.int64)[owner]),
        (owner + first).astype(np.int32),
        (places[start] - offsets[owner]).astype(np.int32),
        (places[start + chars - 1] + 1 - offsets[owner]).astype(np.int32),
    )


def search(found: Index, batch: Words) -> list[tuple[int, int]]:
    """For each text of the batch that holds a run, (text, run): of several the first in the text."""
    if not len(batch.chars):
        return []
    text = _prepare(batch)
    hits = [np.empty((0, 2), np.int64)]
    for anchor, bits in found.filters.items():
        span = len(batch.chars) - anchor + 1
        if span <= 0:
            continue
        at = batch.starts[batch.starts < span] if anchor < EVERYWHERE else np.arange(span)
        hashes = _hash(text, at, anchor)
        lead = hashes >> np.uint64(64 - (len(bits).bit_length() + 2))
        maybe = np.flatnonzero(bits[lead >> np.uint64(3)] & _bit(lead))
        at, hashes = at[maybe], hashes[maybe]
        begin, end = np.searchsorted(found.runs.anchor, np.array([anchor, anchor + 1], np.uint8))
        heads = found.runs.head[begin:end]
        low, high = np.searchsorted(heads, hashes, "left"), np.searchsorted(heads, hashes, "right")
        some = high > low
        at, low, high = at[some], low[some], high[some]
        many = high - low
        place = np.repeat(at, many)
        run = begin + np.repeat(low, many) + np.arange(len(place)) - np.repeat(np.cumsum(many) - many, many)
        good = _same(found.runs, text, run, place)
        hits.append(np.stack([place[good], run[good]], 1))
    every = np.concatenate(hits)
    every = every[np.lexsort((every[:, 1], every[:, 0]))]
    borders = batch.starts[batch.texts[1:]]
    owner = np.searchsorted(borders, every[:, 0], "right")
    firsts, where = np.unique(owner, return_index=True)
    return [(int(t), int(every[w, 1])) for t, w in zip(firsts, where, strict=True)]


def _same(found: Runs, text: _Text, run: np.ndarray, place: np.ndarray) -> np.ndarray:
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
    found = index(table_of([Held(str(i), text, whole, FREE) for i, text in enumerate(eval_texts)]), ngram)
    hits = search(found, cut(train_texts)) if train_texts else []
    return [Overlap(t, int(found.runs.owner[r]), phrase(found, r)) for t, r in hits]


def owner(found: Index, run: int) -> str:
    """The row that holds a run."""
    return str(found.texts.column("owner")[int(found.runs.owner[run])].as_py())


def phrase(found: Index, run: int) -> str:
    """The words of a run."""
    text = found.texts.column("text")[int(found.runs.owner[run])].as_py()
    return " ".join(words(text[int(found.runs.start[run]) : int(found.runs.end[run])]))


def first_of(found: Index, rows: Sequence[Sequence[str]]) -> list[tuple[int, str, str]]:
    """(row, the row that is held out, the words) for each of the rows, given by their texts, that holds a run."""
    owners = [i for i, texts in enumerate(rows) for _ in texts]
    texts = [text for of_row in rows for text in of_row]
    hits: dict[int, tuple[int, str, str]] = {}
    for t, run in search(found, cut(texts)) if texts else ():
        if owners[t] not in hits:
            hits[owners[t]] = (owners[t], owner(found, run), phrase(found, run))
    return list(hits.values())

"""The tables of data/ in shards, and the first pass over them: what is known of every line from that line alone.

A shard is a piece of one file, of 64 MB. The pass leaves of each shard, beside the text's own few bytes:

    facts.arrow   a row a line: why it breaks a rule or is unwanted, its id, and what the expectations look at
    keys.npy      [3, n] digests of id, content and object
    bands.npy, bytes.npy   signatures of the good lines, where near-duplicates are looked for
    counts.zst    occurrences of tokens in the good lines, where poison is looked for
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import zstandard

from components.data import language, neardup, poison, suites
from components.data.jsonlines import Shard, lines
from components.data.quality import Quality, reasons
from components.data.rules import Limits, Row, Unfit, check, content, parse
from components.data.words import cut, word_hashes

TABLES = ("corpus", "instructions", "preferences", "prompts", "eval")
BATCH = 1 << 18  # characters that are looked at together
DIGEST = np.dtype("S16")
ID, CONTENT, OBJECT = range(3)  # rows of keys.npy


class Look(NamedTuple):
    """What the first pass is asked."""

    shard: Shard
    limits: Limits
    languages: tuple[str, ...] | None
    quality: Quality | None
    near: float | None
    poison: bool


def rows(shard: Shard, mask: np.ndarray | None) -> Iterator[tuple[int, Row]]:
    """The shard's rows where the mask says so, with their numbers. They have been checked before."""
    for i, line in enumerate(lines(shard)):
        if mask is None or mask[i]:
            yield i, parse(line)


def batches(shard: Shard, mask: np.ndarray | None) -> Iterator[tuple[list[int], list[str]]]:
    """The texts of the rows that the mask chooses, and their numbers, in batches of about BATCH characters."""
    numbers: list[int] = []
    texts: list[str] = []
    size = 0
    for i, line in enumerate(lines(shard)):
        if mask is not None and not mask[i]:
            continue
        numbers.append(i)
        texts.append(text(shard.table, _quickly(line)))
        size += len(texts[-1])
        if size >= BATCH:
            yield numbers, texts
            numbers, texts, size = [], [], 0
    if texts:
        yield numbers, texts


def _quickly(line: bytes) -> Row:
    """A row that has been checked before. Only a number beyond 64 bits may come out as another."""
    try:
        row: Row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return parse(line)
    return row


def text(table: str, row: Row) -> str:
    """What a row says, with its case and spaces."""
    return str(row["text"]) if table == "corpus" else content(table, row)


def look(job: Look) -> None:
    """The first pass over one shard."""
    table = job.shard.table
    job.shard.work.mkdir(parents=True, exist_ok=True)  # a cluster may do a piece again
    seen = _Seen(job)
    for line in lines(job.shard):
        try:
            row = parse(line)
            said = check(table, row, job.limits)
        except Unfit as e:
            seen.broken(str(e))
        else:
            seen.good(row, said)
    seen.close()


class _Seen:
    """What is known of a shard's lines so far. Good rows wait for others, to be looked at together."""

    def __init__(self, job: Look):
        self.job, self.table = job, job.shard.table
        self.facts: dict[str, list[Any]] = {name: [] for name in suites.FACTS.names}
        self.keys: list[bytes] = []
        self.signed: list[neardup.Signatures] = []
        self.counts = poison.empty() if job.poison else None
        self.numbers: list[int] = []
        self.texts: list[str] = []
        self.size = 0

    def broken(self, reason: str) -> None:
        self._add({"broken": reason})
        self.keys += [b"", b"", b""]

    def good(self, row: Row, said: str) -> None:
        self.numbers.append(len(self.facts["broken"]))
        self._add(suites.facts(self.table, row, said))
        self.keys += [digest(row["id"]), digest(said), digest(row["object"])]
        self.texts.append(row["text"] if self.table == "corpus" else said)
        self.size += len(self.texts[-1])
        if self.size >= BATCH:
            self._together()

    def _add(self, facts: dict[str, Any]) -> None:
        for column, value in zip(self.facts.values(), map(facts.get, self.facts), strict=True):
            column.append(value)

    def _together(self) -> None:
        job, texts = self.job, self.texts
        if job.languages is not None:
            for i, found in zip(self.numbers, language.identify(texts), strict=True):
                self.facts["unwanted"][i] = foreign(found, job.languages)
        if job.quality is not None:
            for i, why in zip(self.numbers, reasons(texts, job.quality), strict=True):
                self.facts["unwanted"][i] = self.facts["unwanted"][i] or why or None
        if job.near is not None:
            words = cut(texts)
            self.signed.append(neardup.signatures(words, word_hashes(words), neardup.rows_of_a_band(job.near)))
        if self.counts is not None:
            poison.count(poison.tokens(texts), self.counts)
        self.numbers, self.texts, self.size = [], [], 0

    def close(self) -> None:
        if self.texts:
            self._together()
        folder = self.job.shard.work
        with pa.OSFile(str(folder / "facts.arrow"), "wb") as f, pa.ipc.new_file(f, suites.FACTS) as writer:
            writer.write_table(pa.table(self.facts, schema=suites.FACTS))
        np.save(folder / "keys.npy", np.array(self.keys, DIGEST).reshape(-1, 3).T)
        neardup.save(self.signed, folder)
        if self.counts is not None:
            save_counts(self.counts, folder / "counts.zst")


def foreign(found: tuple[str, float], wanted: Sequence[str]) -> str | None:
    """The reason against a text that is surely in another language than the wanted ones."""
    lang, belief = found
    if lang in wanted or lang == language.UNKNOWN or belief < 0.65:
        return None
    return f"language: {lang}, wanted {', '.join(wanted)}"


def digest(value: str) -> bytes:
    return hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def save_counts(counts: poison.Counts, path: Path) -> None:
    path.write_bytes(zstandard.compress(b"".join(c.tobytes() for c in counts), 1))


def load_counts(path: Path) -> poison.Counts:
    every = np.frombuffer(zstandard.decompress(path.read_bytes()), np.uint32)
    ends = np.cumsum([len(c) for c in poison.empty()])
    return poison.Counts(*np.split(every, ends[:-1]))

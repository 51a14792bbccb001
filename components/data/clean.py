"""The later passes over the shards: poison, what is held out, and what the rows left hold of it, or of people.

Each pass is a function of one job; what it finds it leaves in the shard's folder.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa

from components.data import contamination, held, items, pii, poison
from components.data.items import Piece
from components.data.rules import Row
from components.data.shards import BATCH, TABLES, Shard, batches, load_counts, rows, save_counts, shards, text
from components.data.spread import HERE, WORTH, Executor, each

SUSPECTS = {"hashes": np.uint64, "texts": np.int64, "runs": np.int64, "bits": np.float64}
SAFE = ("id", "source", "licence", "provenance", "lang", "object", "split", "line", "kind", "role", "name")


class Chosen(NamedTuple):
    """Some lines of a shard: all, where there is no mask."""

    shard: Shard | Piece
    mask: np.ndarray | None


class Ordered(NamedTuple):
    """The rows whose order is judged, by how often tokens stand in all of them, after these phrases."""

    shard: Shard | Piece
    mask: np.ndarray
    counts: Path
    phrases: np.ndarray | None


class Search(NamedTuple):
    """What the rows left are searched for."""

    shard: Shard
    mask: np.ndarray | None
    held: Path  # the index of what is held out
    pii: str


class Hold(NamedTuple):
    """The rows that are held out, and how many of its words make a text that counts alone."""

    shard: Shard
    mask: np.ndarray | None
    whole: int
    redact: bool


def _texts(job: Chosen | Ordered) -> Iterator[tuple[list[int], list[str]]]:
    read = items.texts(job.shard, job.mask) if isinstance(job.shard, Piece) else batches(job.shard, job.mask)
    yield from read


def count(job: Chosen) -> None:
    """How often tokens stand in the chosen rows: gone.zst."""
    counts = poison.empty()
    for _, texts in _texts(job):
        poison.count(poison.tokens(texts), counts)
    save_counts(counts, job.shard.work / "gone.zst")


def suspect(job: Ordered) -> None:
    """Phrases before long runs without order: suspects.npz."""
    counts = load_counts(job.counts)
    found: list[tuple[np.ndarray, ...]] = []
    for numbers, texts in _texts(job):
        cut = poison.tokens(texts)
        seen, at = poison.suspects(cut, poison.score(cut, counts)), np.array(numbers)
        runs = np.array([*seen.runs], np.int64)
        found.append((seen.hashes, at[seen.texts], at[runs], np.array([*seen.runs.values()])))
    found.append(tuple(np.empty(0, dtype) for dtype in SUSPECTS.values()))  # of no rows too these are the types
    columns = [np.concatenate(c) for c in zip(*found, strict=True)]
    np.savez(job.shard.work / "suspects.npz", **dict(zip(SUSPECTS, columns, strict=True)))  # type: ignore[arg-type]


def follow(job: Ordered) -> None:
    """What stands after the phrases: after.npy, rows of (phrase, text, mean score)."""
    counts = load_counts(job.counts)
    assert job.phrases is not None  # noqa: S101
    found: list[tuple[int, int, float]] = []
    for numbers, texts in _texts(job):
        cut = poison.tokens(texts)
        places = poison.after(cut, poison.score(cut, counts), job.phrases)
        found += [(phrase, numbers[t], mean) for phrase, t, mean in places]
    np.save(job.shard.work / "after.npy", np.array(found, np.float64).reshape(-1, 3))


def counted(shard: Shard | Piece, into: poison.Counts) -> None:
    """Add the counts that the first pass left of a shard, and delete them."""
    path = shard.work / "counts.zst"
    for c, more in zip(into, load_counts(path), strict=True):
        np.add(c, more, out=c)
    path.unlink()


def poisoned(
    shards: Sequence[Shard | Piece], counts: poison.Counts, good: Sequence[np.ndarray], left: Sequence[np.ndarray],
    executor: Executor, logs: Path, tell: Callable[[float], None], worth: int = WORTH,
) -> list[int]:  # fmt: skip
    """The numbers, in the whole table, of the poisoned rows among those left. `counts` are those of all good ones."""
    first = np.cumsum([0] + [len(mask) for mask in left])
    gone = [Chosen(s, g & ~x) for s, g, x in zip(shards, good, left, strict=True) if (g & ~x).any()]
    for job in each(count, gone, executor, _size(gone), logs):
        for c, less in zip(counts, load_counts(job.shard.work / "gone.zst"), strict=True):
            np.subtract(c, less, out=c)
        (job.shard.work / "gone.zst").unlink()
    save_counts(counts, logs / "counts.zst")
    jobs = [Ordered(s, x, logs / "counts.zst", None) for s, x in zip(shards, left, strict=True)]
    for i, _ in enumerate(each(suspect, jobs, executor, _size(jobs), logs, worth), start=1):
        tell(i / len(jobs) / 2)
    seen = [dict(np.load(s.work / "suspects.npz")) for s in shards]
    if not seen:
        return []
    texts = np.concatenate([s["texts"] + n for s, n in zip(seen, first[:-1], strict=True)])
    phrases = poison.likely(np.concatenate([s["hashes"] for s in seen]), texts, counts)
    if not len(phrases):
        return []
    jobs = [job._replace(phrases=phrases) for job in jobs]
    for i, _ in enumerate(each(follow, jobs, executor, _size(jobs), logs, worth), start=1):
        tell(0.5 + i / len(jobs) / 2)
    places = [
        (int(phrase), int(t) + int(n), float(mean))
        for s, n in zip(shards, first[:-1], strict=True)
        for phrase, t, mean in np.load(s.work / "after.npy")
    ]
    runs = {
        int(t + n): float(bits)
        for s, n in zip(seen, first[:-1], strict=True)
        for t, bits in zip(s["runs"], s["bits"], strict=True)
    }
    return sorted(poison.verdict(places, runs))


def hold(job: Hold) -> None:
    """What must not be trained on of an eval row or of a row of the test split: held.arrow."""
    found: list[held.Held] = []
    table = job.shard.table
    with (
        pa.OSFile(str(job.shard.work / "held.arrow"), "wb") as f,
        pa.ipc.new_file(f, held.HELD) as writer,
    ):
        for _, row in rows(job.shard, job.mask):
            if table == "eval" or row["split"] == "test":
                found += held.held_texts(table, redacted(row, []) if job.redact else row, job.whole, held.QUESTION)
            if len(found) >= 1024:
                writer.write_table(held.table_of(found))
                found = []
        writer.write_table(held.table_of(found))


def make_index(
    shards: Sequence[Shard], masks: Sequence[np.ndarray | None], extra: pa.Table, ngram: int, whole: int,
    redact: bool, executor: Executor, folder: Path,
) -> None:  # fmt: skip
    """An index, in `folder`, of what is held out: `extra`, the eval rows and the test split's."""
    jobs = [Hold(s, m, whole, redact) for s, m in zip(shards, masks, strict=True)]
    folder.mkdir(parents=True)
    for _ in each(hold, jobs, executor, _size(jobs), folder):
        pass
    tables = [extra]
    for table in dict.fromkeys(s.table for s in shards):
        mapped = [pa.memory_map(str(s.work / "held.arrow")) for s in shards if s.table == table]
        tables.append(held.once(pa.concat_tables(pa.ipc.open_file(m).read_all() for m in mapped)))
    contamination.index(pa.concat_tables(tables), ngram, folder)


def search(job: Search) -> None:
    """Contaminated train rows, personal data in any: found.json, and redacted.jsonl with the rows that change."""
    index = contamination.open_index(job.held)
    told: dict[str, list[Any]] = {"pii": [], "contaminated": []}
    batch: list[tuple[int, Row]] = []
    size = 0
    with (job.shard.work / "redacted.jsonl").open("wb") as f:
        for i, row in rows(job.shard, job.mask):
            batch.append((i, row))
            size += len(text(job.shard.table, row))
            if size >= BATCH:
                _searched(job, index, batch, told, f)
                batch, size = [], 0
        if batch:
            _searched(job, index, batch, told, f)
    (job.shard.work / "found.json").write_bytes(orjson.dumps(told))


def _searched(
    job: Search, index: contamination.Index, batch: list[tuple[int, Row]], told: dict[str, list[Any]], f: Any
) -> None:
    table = job.shard.table
    if job.pii != "off":
        look = pii.worth_a_look([text(table, row) for _, row in batch])
        for k in np.flatnonzero(look).tolist():
            i, row = batch[k]
            kinds: list[str] = []
            new = redacted(row, kinds)
            if kinds:
                told["pii"].append([i, row["id"], ", ".join(sorted(set(kinds)))])
            if kinds and job.pii == "redact":
                batch[k] = i, new
                f.write(json.dumps(new, ensure_ascii=False).encode() + b"\n")
    train = [(i, row) for i, row in batch if table != "eval" and row["split"] == "train"]
    for k, owner, phrase in contamination.first_of(index, [list(held.train_texts(table, row)) for _, row in train]):
        i, row = train[k]
        told["contaminated"].append([i, row["id"], owner, phrase])


def contaminated(folder: Path) -> Iterator[dict[str, str]]:
    """The rows of <table>.jsonl that are trained on and hold words of an eval row or of a row of the test split."""
    with TemporaryDirectory() as work:
        files = [(t, folder / f"{t}.jsonl", f"{t}.jsonl") for t in TABLES if (folder / f"{t}.jsonl").is_file()]
        found = shards(files, Path(work))
        every = [None] * len(found)
        for shard in found:
            shard.work.mkdir()
        index = Path(work) / "index"
        nothing = held.HELD.empty_table()
        make_index(found, every, nothing, contamination.NGRAM, held.WHOLE, False, HERE, index)
        jobs = [Search(shard, None, index, "off") for shard in found]
        for job in each(search, jobs, HERE, _size(jobs), index):
            for _, name, owner, phrase in orjson.loads((job.shard.work / "found.json").read_bytes())["contaminated"]:
                yield {"table": job.shard.table, "id": name, "held": owner, "phrase": phrase}


def redacted(value: Any, kinds: list[str]) -> Any:
    """A row, or a part of it, without personal data; its kinds are added to `kinds`."""
    if isinstance(value, str):
        new, found = pii.redact(value)
        kinds += found
        return new
    if isinstance(value, list):
        return [redacted(v, kinds) for v in value]
    if isinstance(value, dict):
        return {k: v if k in SAFE else redacted(v, kinds) for k, v in value.items()}
    return value


def held_out(paths: Sequence[str], whole: int) -> pa.Table:
    """What the named sets hold that must not be trained on. Raises ForjaError for a path that is not there."""
    return items.held_texts(paths, whole, lambda what, part: None)


def _size(jobs: Sequence[Any]) -> int:
    return sum(job.shard.size for job in jobs)

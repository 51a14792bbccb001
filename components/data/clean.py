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

from components.data import contamination, held, items, pii, poison, triggers
from components.data.items import Piece
from components.data.jsonlines import SIZE, Shard, shards
from components.data.rules import Row
from components.data.shards import BATCH, TABLES, batches, load_counts, rows, save_counts, text
from components.data.spread import HERE, WORTH, Executor, each

PIECE = 1 << 21  # phrases that are counted together
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


def counted(shard: Shard | Piece, into: poison.Counts) -> None:
    """Add the counts that the first pass left of a shard, and delete them."""
    path = shard.work / "counts.zst"
    for c, more in zip(into, load_counts(path), strict=True):
        np.add(c, more, out=c)
    path.unlink()


def suspect(job: Ordered) -> None:
    """Phrases before long runs without order, with the number of their rows: phrases.npy, times.npy; and the runs:
    runs.npy."""
    counts = load_counts(job.counts)
    hashes, runs = [np.empty(0, np.uint64)], [np.empty(0, triggers.RUN)]
    for numbers, texts in _texts(job):
        cut = poison.tokens(texts)
        seen = poison.suspects(cut, poison.score(cut, counts))
        hashes.append(seen.hashes)  # of one row each is another
        runs.append(np.array([(numbers[t], bits) for t, bits in seen.runs.items()], triggers.RUN))
    phrases, times = np.unique(np.concatenate(hashes), return_counts=True)
    np.save(job.shard.work / "phrases.npy", phrases)
    np.save(job.shard.work / "times.npy", times.astype(np.int32))
    np.save(job.shard.work / "runs.npy", np.concatenate(runs))


def follow(job: Ordered) -> None:
    """What stands after the phrases: after.npy, PLACEs by phrase and text."""
    counts = load_counts(job.counts)
    assert job.phrases is not None  # noqa: S101
    found = [np.empty(0, triggers.PLACE)]
    for numbers, texts in _texts(job):
        cut = poison.tokens(texts)
        places = poison.after(cut, poison.score(cut, counts), job.phrases)
        places["text"] = np.array(numbers)[places["text"]]
        found.append(places)
    every = np.concatenate(found)
    np.save(job.shard.work / "after.npy", every[np.argsort(every["phrase"], kind="stable")])


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
    phrases = _rare([s.work for s in shards], counts)
    if not len(phrases):
        return []
    jobs = [job._replace(phrases=phrases) for job in jobs]
    for i, _ in enumerate(each(follow, jobs, executor, _size(jobs), logs, worth), start=1):
        tell(0.5 + i / len(jobs) / 2)
    runs = [np.load(s.work / "runs.npy") for s in shards]
    for of_shard, n in zip(runs, first[:-1], strict=True):
        of_shard["text"] += n
    places = [np.load(s.work / "after.npy", mmap_mode="r") for s in shards]
    found = triggers.judged([*zip(places, first[:-1].tolist(), strict=True)], np.concatenate(runs))
    return [int(i) for i in found]


def _rare(folders: Sequence[Path], counts: poison.Counts) -> np.ndarray:
    """The phrases that may be triggers, of those that the shards suspect: a slice of all hashes at a time."""
    seen = [(np.load(f / "phrases.npy", mmap_mode="r"), np.load(f / "times.npy", mmap_mode="r")) for f in folders]
    pieces = 1 + sum(len(hashes) for hashes, _ in seen) // PIECE
    edges = [np.uint64((k << 64) // pieces) for k in range(pieces)]
    found = [np.empty(0, np.uint64)]
    for k, edge in enumerate(edges):
        last = [np.searchsorted(h, edges[k + 1]) if k + 1 < pieces else len(h) for h, _ in seen]
        slices = [slice(np.searchsorted(h, edge), end) for (h, _), end in zip(seen, last, strict=True)]
        hashes, back = np.unique(
            np.concatenate([h[at] for (h, _), at in zip(seen, slices, strict=True)]), return_inverse=True
        )
        times = np.concatenate([t[at] for (_, t), at in zip(seen, slices, strict=True)])
        found.append(poison.rare(hashes, np.bincount(back, times, len(hashes)).astype(np.int64), counts))
    return np.concatenate(found)


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
        found = shards(files, Path(work), SIZE)
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

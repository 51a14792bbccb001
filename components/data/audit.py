"""Audit: what is in any data, before anything is done with it. Nothing is left on disk.

1. every file, or part of a large one, is read, and what is known of its rows is noted in a folder of its own;
2. copies are looked for among the notes of all;
3. the files are read again where poison is looked for, and a third time where a trigger of it is suspected.

Reading is done on all cores; what comes out does not depend on how many there are. Every count is of rows, but for the
records that were read and turned away.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from components.data import clean, contamination, held, items, language, neardup, pii, poison, quality, readers
from components.data.items import Item, Piece, Tell
from components.data.rules import CHECKS, content
from components.data.shards import TABLES, save_counts
from components.data.sources import hashed
from components.data.spread import HERE, Executor, each
from components.data.strict import Unfit
from components.data.words import cut, word_hashes

WORTH = 1 << 23  # bytes; less is done faster by this process alone than by several
THRESHOLD = 0.8
EXAMPLES = 5


class Look(NamedTuple):
    """What the first pass is asked."""

    piece: Piece
    held: Path  # the index of what the eval sets hold


def audit(paths: Sequence[str], against: Sequence[str], tell: Tell, executor: Executor = HERE) -> dict[str, Any]:
    """Rows, shapes, languages, duplicates, contamination, quality, personal data, quarantine and poison of `paths`."""
    with TemporaryDirectory(prefix="forja-audit-") as folder:
        return _audited(paths, against, tell, executor, Path(folder))


def _audited(
    paths: Sequence[str], against: Sequence[str], tell: Tell, executor: Executor, work: Path
) -> dict[str, Any]:
    (work / "index").mkdir()
    contamination.index(items.held_texts(against, held.WHOLE, tell), folder=work / "index")
    own = {p.resolve() for source in against for p in readers.files_of(source)}
    pieces = items.pieces([p for source in paths for p in readers.files_of(source)], own, work)
    whole = sum(p.size for p in pieces)
    counts = poison.empty()
    seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
    hit: list[dict[str, str]] = []
    done = 0
    for job in each(look, [Look(p, work / "index") for p in pieces], executor, whole, work, WORTH):
        facts = json.loads((job.piece.work / "facts.json").read_bytes())
        for name, more in facts["seen"].items():
            seen[name].update(more)
        hit += facts["hit"][: EXAMPLES - len(hit)]
        clean.counted(job.piece, counts)
        done += job.piece.size
        tell("rows", done / max(1, whole))
    first = np.cumsum([0, *(len(np.load(p.work / "hashes.npy", mmap_mode="r")) for p in pieces)])
    copies, near, examples = duplicates(pieces)
    every = [np.ones(n, bool) for n in np.diff(first)]
    flagged = clean.poisoned(pieces, counts, every, every, executor, work, lambda part: tell("order", part), WORTH)
    one = seen["one"]
    return {
        "records": one["records"],
        "rows": seen["tables"].total(),
        "tables": dict(seen["tables"]),
        "shapes": dict(seen["shapes"]),
        "languages": dict(seen["languages"].most_common()),
        "duplicates": {
            "exact": copies,
            "near": near,
            "examples": [{"row": _place(pieces, first, i), "of": _place(pieces, first, j)} for i, j in examples],
        },
        "contamination": {"against": list(against), "own": one["own"], "rows": one["contaminated"], "examples": hit},
        "quality": {"filters": dict(seen["filters"]), "reasons": dict(seen["quality"].most_common())},
        "pii": {"rows": one["personal"], "kinds": dict(seen["pii"])},
        "quarantine": {"records": seen["quarantine"].total(), "reasons": dict(seen["quarantine"])},
        "rules": {"rows": seen["rules"].total(), "reasons": dict(seen["rules"].most_common())},
        "poison": {"rows": len(flagged), "examples": [_place(pieces, first, i) for i in flagged[:EXAMPLES]]},
    }


def look(job: Look) -> None:
    """The first pass over one piece. It leaves of it

    facts.json      counts by what is counted, and the first rows that are contaminated
    places.jsonl    a line a row: where it stands
    hashes.npy, tables.npy   of each row what its exact copies have in common, and its table's number
    bands.npy, bytes.npy     signatures, by which near-duplicates are found
    counts.zst      occurrences of tokens, where poison is looked for
    """
    index = contamination.open_index(job.held)
    folder = job.piece.work
    folder.mkdir()
    seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
    counts = poison.empty()
    hit: list[dict[str, str]] = []
    hashes, tables = [np.empty(0, np.uint64)], [np.empty(0, np.uint8)]
    signed: list[neardup.Signatures] = []
    with (folder / "places.jsonl").open("w", encoding="ascii") as places:
        for records, rows, reasons in items.batches(job.piece.files):
            seen["quarantine"].update(reason.partition(":")[0] for reason in reasons)
            seen["one"]["records"] += records
            if not rows:
                continue
            texts = [row.text for row in rows]
            _count(rows, texts, seen)
            hashes.append(np.array([hashed(f"{i.table}/{exact(i)}") for i in rows], np.uint64))
            tables.append(np.array([TABLES.index(i.table) for i in rows], np.uint8))
            words = cut(texts)
            signed.append(neardup.signatures(words, word_hashes(words), neardup.rows_of_a_band(THRESHOLD)))
            poison.count(poison.tokens(texts), counts)
            found = contaminated(index, [row for row in rows if not row.own])
            seen["one"]["contaminated"] += len(found)
            hit += found[: EXAMPLES - len(hit)]
            places.writelines(json.dumps(row.place) + "\n" for row in rows)
    (folder / "facts.json").write_text(json.dumps({"seen": seen, "hit": hit}), encoding="ascii")
    np.save(folder / "hashes.npy", np.concatenate(hashes))
    np.save(folder / "tables.npy", np.concatenate(tables))
    neardup.save(signed, folder)
    save_counts(counts, folder / "counts.zst")


def _count(rows: Sequence[Item], texts: Sequence[str], seen: dict[str, Counter[str]]) -> None:
    """What is counted of each row by itself."""
    seen["tables"].update(row.table for row in rows)
    seen["shapes"].update(row.shape for row in rows)
    seen["one"]["own"] += sum(row.own for row in rows)
    seen["rules"].update(filter(None, map(rule_broken, rows)))
    seen["languages"].update(lang for lang, _ in language.identify(texts))
    documents = [text for row, text in zip(rows, texts, strict=True) if row.table == "corpus"]
    for name, against_them in quality.by_filter(documents, quality.ALL).items():
        seen["filters"][name] += sum(why != "" for why in against_them)
        seen["quality"].update(why.rsplit(" ", 3)[0].removeprefix("quality: ") for why in against_them if why)
    for text, worth in zip(texts, pii.worth_a_look(texts), strict=True):
        if worth and (found := pii.find(text)):
            seen["one"]["personal"] += 1
            seen["pii"].update(f.kind for f in found)


def exact(row: Item) -> str:
    """What two rows have in common that are exact duplicates: every character."""
    return row.text if row.table == "corpus" else f"{content(row.table, row.row)}\n{row.row.get('answer', '')}"


def rule_broken(row: Item) -> str | None:
    """The kind of rule that validate would refuse the row for."""
    try:
        CHECKS[row.table](row.row)
    except Unfit as e:
        return str(e).partition(":")[0]
    return None


def contaminated(index: contamination.Index, rows: Sequence[Item]) -> list[dict[str, str]]:
    """The rows that hold a held-out text: {row, held, phrase}."""
    texts = [[*held.train_texts(i.table, i.row), *([i.row["question"]] if i.table == "eval" else [])] for i in rows]
    found = contamination.first_of(index, texts)
    return [{"row": rows[i].place, "held": owner, "phrase": phrase} for i, owner, phrase in found]


def duplicates(pieces: Sequence[Piece]) -> tuple[int, int, list[tuple[int, int]]]:
    """(rows that are an exact copy of an earlier row, further rows that are nearly one, of the latter the first ones as
    (row, of which row), numbered through all the pieces)."""
    if not pieces:
        return 0, 0, []
    every = np.concatenate([np.load(p.work / "hashes.npy") for p in pieces])
    table = np.concatenate([np.load(p.work / "tables.npy") for p in pieces])
    _, first = np.unique(every, return_index=True)
    first = np.sort(first)
    salt = table[first].astype(np.uint32) * np.uint32(0x9E3779B1)  # rows of two tables are no copies of each other
    label = neardup.first_of([p.work for p in pieces], first, THRESHOLD, salt)
    near = np.flatnonzero(label != np.arange(len(label)))
    examples = [(int(first[i]), int(first[label[i]])) for i in near[:EXAMPLES]]
    return len(every) - len(first), len(near), examples


def _place(pieces: Sequence[Piece], first: np.ndarray, row: int) -> str:
    """Where a row stands, `first` being the number of each piece's first row."""
    k = int(np.searchsorted(first, row, "right")) - 1
    with (pieces[k].work / "places.jsonl").open(encoding="ascii") as f:
        at = row - int(first[k])
        return str(json.loads(next(islice(f, at, None))))

"""Audit: what is in any data, before anything is done with it. Nothing is written.

Every count is of rows, but for the records that were read and turned away. Files are read twice, and a third time
where a trigger of poison is suspected.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from components.data import contamination, convert, held, language, neardup, pii, poison, quality, readers, shapes
from components.data.rules import CHECKS, content
from components.data.sources import hashed
from components.data.strict import Unfit
from components.data.words import cut, word_hashes

BATCH = 1 << 18  # characters that are looked at together
THRESHOLD = 0.8
EXAMPLES = 5

Tell = Callable[[str, float], None]  # what is done, and how much of it in [0, 1]


class Item(NamedTuple):
    """A row with where it stands, or with a reason a record that is none."""

    place: str
    shape: str
    table: str
    row: dict[str, Any]
    reason: str | None = None


def items(paths: Sequence[str]) -> Iterator[tuple[Path, list[Item]]]:
    """What stands in the files, a record's rows at a time."""
    for source in paths:
        for path in readers.files_of(source):
            found, sample = convert.sampled(readers.records(path))
            try:
                shape = shapes.detect(sample) if sample else None
            except Unfit:
                shape = None
            for record in found:
                yield path, _rows(record, shape)


def _rows(record: readers.Record, shape: str | None) -> list[Item]:
    place = f"{record.file}:{record.line}"
    if record.reason is not None:
        return [Item(place, "", "", {}, record.reason)]
    name = shape or shapes.name_of(record.value)
    try:
        if name is None:
            raise Unfit(shapes.no_shape(record.value))
        made = shapes.rows(name, record.value)
    except Unfit as e:
        return [Item(place, "", "", {}, str(e))]
    return [Item(place, name, table, {**fields, "id": place}) for table, fields in made]


def exact(table: str, row: dict[str, Any]) -> str:
    """What two rows have in common that are exact duplicates: every character."""
    return row["text"] if table == "corpus" else f"{content(table, row)}\n{row.get('answer', '')}"


def batches(paths: Sequence[str], tell: Tell, what: str) -> Iterator[list[Item]]:
    """All items, in batches of rows of about BATCH characters."""
    files = [p for s in paths for p in readers.files_of(s)]
    whole = sum(p.stat().st_size for p in files) or 1
    done, last = 0, None
    batch: list[Item] = []
    size = 0
    for path, found in items(paths):
        if path != last:
            done += last.stat().st_size if last else 0
            last = path
        batch += found
        size += sum(len(exact(i.table, i.row)) for i in found if i.reason is None)
        if size >= BATCH or len(batch) >= 4096:
            tell(what, min(1.0, done / whole))
            yield batch
            batch, size = [], 0
    tell(what, 1.0)
    if batch:
        yield batch


def held_texts(paths: Sequence[str], whole: int, tell: Tell) -> pa.Table:
    """What the sets hold that is to be kept out of training. Raises ForjaError for a path that is not there."""
    by_table: dict[str, list[dict[str, Any]]] = {}
    for batch in batches(paths, tell, "eval sets"):
        for item in batch:
            if item.reason is None:
                by_table.setdefault(item.table, []).append(item.row)
    tables = [
        [h for row in rows for h in held.held_texts(table, row, whole, held.QUESTION, True)]
        for table, rows in by_table.items()
    ]
    return pa.concat_tables([held.HELD.empty_table(), *(held.once(held.table_of(t)) for t in tables)])


def audit(paths: Sequence[str], against: Sequence[str], tell: Tell) -> dict[str, Any]:
    """Rows, shapes, languages, duplicates, contamination, quality, personal data, quarantine and poison of `paths`."""
    index = contamination.index(held_texts(against, held.WHOLE, tell))
    read = turned = 0
    tables: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    langs: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    broken: Counter[str] = Counter()
    personal: Counter[str] = Counter()
    filters: Counter[str] = Counter()
    poor: Counter[str] = Counter()
    with_personal = 0
    hit: list[dict[str, str]] = []
    dirty = 0
    hashes: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    signed: list[neardup.Signatures] = []
    places: list[str] = []
    counts = poison.empty()
    width = neardup.rows_of_a_band(THRESHOLD)
    for batch in batches(paths, tell, "rows"):
        read += len({i.place for i in batch})
        for item in batch:
            if item.reason is not None:
                turned += 1
                reasons[item.reason.partition(":")[0]] += 1
        rows = [i for i in batch if i.reason is None]
        if not rows:
            continue
        texts = [content(i.table, i.row) if i.table != "corpus" else i.row["text"] for i in rows]
        tables.update(i.table for i in rows)
        broken.update(filter(None, (rule_broken(i) for i in rows)))
        kinds.update(i.shape for i in rows)
        langs.update(lang for lang, _ in language.identify(texts))
        of_table = {t: k for k, t in enumerate(("corpus", "instructions", "preferences", "prompts", "eval"))}
        hashes.append(np.array([hashed(f"{i.table}/{exact(i.table, i.row)}") for i in rows], np.uint64))
        owners.append(np.array([of_table[i.table] for i in rows], np.uint8))
        documents = [text for item, text in zip(rows, texts, strict=True) if item.table == "corpus"]
        for name, against_them in quality.by_filter(documents, quality.ALL).items():
            filters[name] += sum(why != "" for why in against_them)
            poor.update(why.rsplit(" ", 3)[0].removeprefix("quality: ") for why in against_them if why)
        words = cut(texts)
        signed.append(neardup.signatures(words, word_hashes(words), width))
        places += [i.place for i in rows]
        for text, look in zip(texts, pii.worth_a_look(texts), strict=True):
            if look and (found := pii.find(text)):
                with_personal += 1
                personal.update(f.kind for f in found)
        poison.count(poison.tokens(texts), counts)
        found_here = contaminated(index, rows)
        dirty += len(found_here)
        hit += found_here[: max(0, EXAMPLES - len(hit))]
    copies, near, examples = duplicates(hashes, owners, signed, places)
    flagged = poisoned(paths, counts, tell)
    return {
        "records": read,
        "rows": sum(tables.values()),
        "tables": dict(tables),
        "shapes": dict(kinds),
        "languages": dict(langs.most_common()),
        "duplicates": {"exact": copies, "near": near, "examples": examples},
        "contamination": {"against": list(against), "rows": dirty, "examples": hit},
        "quality": {"filters": dict(filters), "reasons": dict(poor.most_common())},
        "pii": {"rows": with_personal, "kinds": dict(personal)},
        "quarantine": {"records": turned, "reasons": dict(reasons)},
        "rules": {"rows": broken.total(), "reasons": dict(broken.most_common())},
        "poison": {"rows": len(flagged), "examples": flagged[:EXAMPLES]},
    }


def rule_broken(item: Item) -> str | None:
    """The kind of rule that validate would refuse the row for."""
    try:
        CHECKS[item.table](item.row)
    except Unfit as e:
        return str(e).partition(":")[0]
    return None


def contaminated(index: contamination.Index, rows: Sequence[Item]) -> list[dict[str, str]]:
    """The rows that hold a held-out text: {row, held, phrase}."""
    texts = [[*held.train_texts(i.table, i.row), *([i.row["question"]] if i.table == "eval" else [])] for i in rows]
    found = contamination.first_of(index, texts)
    return [{"row": rows[i].place, "held": owner, "phrase": phrase} for i, owner, phrase in found]


def duplicates(
    hashes: list[np.ndarray], owners: list[np.ndarray], signed: list[neardup.Signatures], places: list[str]
) -> tuple[int, int, list[dict[str, str]]]:
    """(rows that are an exact copy of an earlier row, further rows that are nearly one, examples of the latter)."""
    if not hashes:
        return 0, 0, []
    every, owner = np.concatenate(hashes), np.concatenate(owners)
    _, first = np.unique(every, return_index=True)
    first = np.sort(first)
    bytes_ = np.concatenate([s.bytes for s in signed])[first]
    salt = owner[first].astype(np.uint32) * np.uint32(0x9E3779B1)  # rows of two tables are no copies of each other
    bands = signed[0].bands.shape[0]
    keys = (np.concatenate([s.bands[b] for s in signed])[first] ^ salt for b in range(bands))
    label = neardup.clusters(len(first), neardup.pairs(keys, bytes_, THRESHOLD))
    copies = np.flatnonzero(label != np.arange(len(label)))
    examples = [{"row": places[first[i]], "of": places[first[label[i]]]} for i in copies[:EXAMPLES]]
    return len(every) - len(first), len(copies), examples


def poisoned(paths: Sequence[str], counts: poison.Counts, tell: Tell) -> list[str]:
    """The places of the rows that a trigger of poison stands in."""
    seen: list[poison.Suspects] = []
    at = 0
    for texts, _ in _texts(paths, tell):
        found = poison.tokens(texts)
        s = poison.suspects(found, poison.score(found, counts))
        seen.append(poison.Suspects(s.hashes, s.texts + at, {t + at: bits for t, bits in s.runs.items()}))
        at += len(texts)
    if not seen:
        return []
    phrases = poison.likely(np.concatenate([s.hashes for s in seen]), np.concatenate([s.texts for s in seen]), counts)
    if not len(phrases):
        return []
    places: list[tuple[int, int, float]] = []
    where: dict[int, str] = {}
    at = 0
    runs = {t: bits for s in seen for t, bits in s.runs.items()}
    for texts, names in _texts(paths, tell):
        found = poison.tokens(texts)
        for phrase, text, mean in poison.after(found, poison.score(found, counts), phrases):
            places.append((phrase, text + at, mean))
        where |= {i + at: name for i, name in enumerate(names)}
        at += len(texts)
    return [where[t] for t in sorted(poison.verdict(places, runs))]


def _texts(paths: Sequence[str], tell: Tell) -> Iterator[tuple[list[str], list[str]]]:
    for batch in batches(paths, tell, "order"):
        rows = [i for i in batch if i.reason is None]
        if rows:
            yield (
                [content(i.table, i.row) if i.table != "corpus" else i.row["text"] for i in rows],
                [i.place for i in rows],
            )

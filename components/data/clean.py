"""The checks that a recipe may ask of rows that break no rule: language, near-duplicates, poison, personal data."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from components.data import audit, contamination, language, neardup, pii, poison
from components.data.rules import Row, content
from components.data.words import cut, word_hashes

BATCH = 1 << 18  # characters
SAFE = ("id", "source", "licence", "provenance", "lang", "object", "split", "line", "kind", "role", "name")


def text(table: str, row: Row) -> str:
    """What a row says, with its case and spaces."""
    return str(row["text"]) if table == "corpus" else content(table, row)


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    first = size = 0
    for i, one in enumerate(texts, start=1):
        size += len(one)
        if size >= BATCH or i == len(texts):
            yield texts[first:i]
            first, size = i, 0


def languages(table: str, rows: Sequence[Row], wanted: Sequence[str]) -> list[str]:
    """A reason against each row that is surely in another language than the wanted ones, else ""."""
    found = language.identify([text(table, row) for row in rows])
    unwanted = [lang not in wanted and lang != language.UNKNOWN and belief >= 0.65 for lang, belief in found]
    return [
        f"language: {lang}, wanted {', '.join(wanted)}" if bad else ""
        for (lang, _), bad in zip(found, unwanted, strict=True)
    ]


def near_duplicates(table: str, rows: Sequence[Row], threshold: float) -> dict[int, int]:
    """Rows that are nearly copies, and of which earlier row."""
    width = neardup.rows_of_a_band(threshold)
    signed = []
    for part in _batches([text(table, row) for row in rows]):
        words = cut(part)
        signed.append(neardup.signatures(words, word_hashes(words), width))
    if not signed:
        return {}
    keys = (np.concatenate([s.bands[b] for s in signed]) for b in range(len(signed[0].bands)))
    label = neardup.clusters(len(rows), neardup.pairs(keys, np.concatenate([s.bytes for s in signed]), threshold))
    return {int(i): int(label[i]) for i in np.flatnonzero(label != np.arange(len(label)))}


def poisoned(table: str, rows: Sequence[Row]) -> list[int]:
    return sorted(poison.detect([text(table, row) for row in rows]))


def personal(table: str, rows: Sequence[Row]) -> dict[int, tuple[Row, list[str]]]:
    """The rows with personal data: each with that data redacted, and the kinds found."""
    found = {}
    look = pii.worth_a_look([text(table, row) for row in rows]) if rows else np.empty(0, bool)
    for i in np.flatnonzero(look).tolist():
        kinds: list[str] = []
        row = _redacted(rows[i], kinds)
        if kinds:
            found[i] = (row, sorted(set(kinds)))
    return found


def _redacted(value: Any, kinds: list[str]) -> Any:
    if isinstance(value, str):
        new, found = pii.redact(value)
        kinds += found
        return new
    if isinstance(value, list):
        return [_redacted(v, kinds) for v in value]
    if isinstance(value, dict):
        return {k: v if k in SAFE else _redacted(v, kinds) for k, v in value.items()}
    return value


def held_out(paths: Sequence[str], whole: int) -> list[contamination.Held]:
    """What the named sets hold that must not be trained on. Raises ForjaError for a path that is not there."""
    return audit.held_texts(paths, whole, lambda what, part: None)


def unread(data: Path) -> list[dict[str, Any]]:
    """What ingest turned away, as rows of rejected.jsonl."""
    path = data / "quarantine.jsonl"
    if not path.is_file():
        return []
    with path.open("rb") as f:
        rows = [json.loads(line) for line in f]
    return [
        {"table": "unread", "file": r["file"], "line": r["line"], "reason": r["reason"], "row": r["raw"]} for r in rows
    ]

"""Any files as rows with their places, in pieces of work that do not depend on who does them.

Rows of a large file's parts are those that `ingest` makes of it.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from components.data import convert, held, readers, shapes
from components.data.shards import BATCH, text
from components.data.strict import Unfit

LINES = 1 << 22  # bytes of a large .jsonl, whose rows do not depend on where it is cut, that are one part
TOGETHER = 1 << 22  # bytes of small files that are one piece of work
MANY = 4096  # records that are looked at together, at the most

Tell = Callable[[str, float], None]  # what is done, and how much of it in [0, 1]


class File(NamedTuple):
    """A file or a part of it. `own`: it is itself one of the sets that must not be trained on."""

    path: Path
    part: readers.Part | None
    own: bool


class Piece(NamedTuple):
    """Files that are read by one process, one after another, and the folder for what is found in them."""

    files: tuple[File, ...]
    size: int
    work: Path


class Item(NamedTuple):
    """A row with where it stands, or with a reason a record that is none."""

    place: str
    own: bool
    shape: str
    table: str
    row: dict[str, Any]
    reason: str | None = None

    @property
    def text(self) -> str:
        return text(self.table, self.row)


def pieces(paths: Sequence[Path], own: set[Path], work: Path) -> list[Piece]:
    """The files in their order: large ones in parts, small ones together. `own` are resolved paths."""
    found: list[Piece] = []
    files: list[File] = []
    size = 0
    for path in paths:
        lines = readers.kind_of(path.name)[0] == "jsonl"
        parts = list(convert.parts_of(path, LINES if lines else convert.BLOCK))
        for part in parts:
            files.append(File(path, part, path.resolve() in own))
            size += path.stat().st_size // len(parts)
            if size >= TOGETHER:
                found.append(Piece(tuple(files), size, work / f"{len(found):06d}"))
                files, size = [], 0
    return [*found, Piece(tuple(files), size, work / f"{len(found):06d}")] if files else found


def items(file: File) -> Iterator[list[Item]]:
    """What stands in a file, a record's rows at a time."""
    found, sample = convert.opened(file.path, None, file.part)
    try:
        shape = shapes.detect(sample) if sample else None
    except Unfit:
        shape = None
    for record in found:
        yield _rows(record, shape, file.own)


def _rows(record: readers.Record, shape: str | None, own: bool) -> list[Item]:
    place = f"{record.file}:{record.line}"
    if record.reason is not None:
        return [Item(place, own, "", "", {}, record.reason)]
    name = shape or shapes.name_of(record.value)
    try:
        if name is None:
            raise Unfit(shapes.no_shape(record.value))
        name, made = shapes.fitted(name, record.value)
    except Unfit as e:
        return [Item(place, own, "", "", {}, str(e))]
    return [Item(place, own, name, table, {**fields, "id": place}) for table, fields in made]


class Batch(NamedTuple):
    """How many records were read, the rows that they are, and the reasons against those that gave none."""

    records: int
    rows: list[Item]
    reasons: list[str]


def batches(files: Sequence[File]) -> Iterator[Batch]:
    """What the files hold, in batches of about BATCH characters."""
    rows: list[Item] = []
    reasons: list[str] = []
    records = size = 0
    for file in files:
        for found in items(file):
            records += 1
            for item in found:
                if item.reason is None:
                    rows.append(item)
                    size += len(item.text)
                else:
                    reasons.append(item.reason)
            if size >= BATCH or records >= MANY:
                yield Batch(records, rows, reasons)
                rows, reasons, records, size = [], [], 0, 0
    if records:
        yield Batch(records, rows, reasons)


def texts(piece: Piece, mask: np.ndarray | None) -> Iterator[tuple[list[int], list[str]]]:
    """The texts of the rows that the mask chooses, and their numbers, as of a shard."""
    first = 0
    for _, rows, _ in batches(piece.files):
        chosen = [i for i in range(len(rows)) if mask is None or mask[first + i]]
        if chosen:
            yield [first + i for i in chosen], [rows[i].text for i in chosen]
        first += len(rows)


def held_texts(paths: Sequence[str], whole: int, tell: Tell) -> pa.Table:
    """What the sets hold that is to be kept out of training. Raises ForjaError for a path that is not there."""
    by_table: dict[str, list[dict[str, Any]]] = {}
    files = [p for source in paths for p in readers.files_of(source)]
    for i, path in enumerate(files):
        tell("eval sets", i / len(files))
        for found in items(File(path, None, True)):
            for item in found:
                if item.reason is None:
                    by_table.setdefault(item.table, []).append(item.row)
    tables = [
        [h for row in rows for h in held.held_texts(table, row, whole, held.QUESTION, True)]
        for table, rows in by_table.items()
    ]
    return pa.concat_tables([held.HELD.empty_table(), *(held.once(held.table_of(t)) for t in tables)])

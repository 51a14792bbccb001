"""The rows of Parquet, Arrow, CSV and TSV, as streams."""

import csv
import json
import re
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from components.data.strict import DAMAGED

BATCH = 512  # rows that are turned into Python values at a time
FIELD = 1 << 26  # characters of one field of CSV
AGAIN = 100  # quotes that are never closed after which the lines below are read anew
# The questions of MMLU as first published have no header: a question, four choices and the letter of the right one.
HEADLESS = ["question", "A", "B", "C", "D", "answer"]


def errors() -> tuple[type[Exception], ...]:
    """What a broken Parquet, Arrow or CSV file raises."""
    import pyarrow

    return (pyarrow.ArrowException, csv.Error, OSError)


def seekable(f: IO[bytes]) -> IO[bytes]:
    """The whole of a stream where one can jump about in it: in memory, or where it is large in an unnamed file."""
    copy = tempfile.SpooledTemporaryFile(1 << 24)  # noqa: SIM115  # it goes with its last reader
    while chunk := f.read(1 << 20):
        copy.write(chunk)
    copy.seek(0)
    return copy


def rows(kind: str, source: Path | IO[bytes], groups: range | None, line: int) -> Iterator[tuple[int, Any]]:
    """(number, row) of a Parquet or Arrow file; `groups` are the row groups to read, `line` the first row's number."""
    for batch in _batches(kind, source, groups):
        for at in range(0, batch.num_rows, BATCH):
            for value in _values(batch.slice(at, BATCH)):
                yield line, value
                line += 1


def _batches(kind: str, source: Path | IO[bytes], groups: range | None) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    where: Any = str(source) if isinstance(source, Path) else source
    if kind == "parquet":
        with pyarrow.parquet.ParquetFile(where, pre_buffer=False) as parquet:
            yield from parquet.iter_batches(BATCH, row_groups=list(groups) if groups is not None else None)
        return
    with pyarrow.memory_map(where) if isinstance(source, Path) else pyarrow.PythonFile(where, "r") as f:
        if f.read(6) == b"ARROW1":  # the file format; `datasets` writes the stream format
            reader = pyarrow.ipc.open_file(f)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            f.seek(0)
            yield from pyarrow.ipc.open_stream(f)


def _values(batch: Any) -> list[Any]:
    """Rows as dicts. Where a text's bytes are no UTF-8, that row alone is bytes that say so."""
    try:
        found: list[Any] = batch.to_pylist()
    except UnicodeDecodeError as e:
        if batch.num_rows == 1:
            return [f"not UTF-8: byte {e.start + 1} of a text is 0x{e.object[e.start]:02x}".encode()]
        half = batch.num_rows // 2
        return _values(batch.slice(0, half)) + _values(batch.slice(half))
    return found


def groups_of(path: Path) -> list[int]:
    """The rows of each row group of a Parquet file."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as parquet:
        return [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]


def as_text(value: Any) -> bytes:
    """A row as JSON, to be shown: its own bytes are no text."""
    return json.dumps(value, ensure_ascii=False, default=repr).encode("utf-8", "surrogatepass")


class _Lines:
    """The lines of a CSV as text, those that the last row took, and a way to read them again."""

    def __init__(self, read: Iterable[tuple[int, bytes, bool]]):
        self.read, self.again = iter(read), deque[tuple[int, bytes, bool]]()
        self.taken: list[tuple[int, bytes, bool]] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.again.popleft() if self.again else next(self.read)
        self.taken.append(line)
        return line[1].decode("utf-8", "surrogateescape")

    def give_back(self) -> None:
        """All but the first line of the last row will come again."""
        self.again.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]

    @property
    def raw(self) -> bytes:
        return b"".join(line for _, line, _ in self.taken).rstrip(b"\r\n")


def csv_rows(read: Iterable[tuple[int, bytes, bool]], delimiter: str) -> Iterator[tuple[int, Any, bytes, str | None]]:
    """(line, row by the header's names, its bytes, reason). A row may hold line ends within quotes; a quote that is
    never closed costs the line where it stands, and the lines after it are read anew."""
    csv.field_size_limit(FIELD)
    lines = _Lines(read)
    first = next(lines, None)
    if first is None:
        return
    if said := re.fullmatch(r"sep=(.)\s*", first):  # a spreadsheet's own line
        delimiter, first = said[1], next(lines, "")
        del lines.taken[0]
    elif delimiter == ",":
        delimiter = _delimiter(first)
    lines.again.extend(lines.taken)
    lines.taken.clear()
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(reader)
    except (StopIteration, csv.Error) as e:
        if lines.taken:
            yield 1, None, lines.raw, f"not CSV: its header cannot be read ({e}); what follows was not read"
        return
    if len(header) == len(HEADLESS) and re.fullmatch("[A-D]", header[-1].strip()):
        yield 1, dict(zip(HEADLESS, header, strict=True)), lines.raw, None
        header = HEADLESS
    header = _told_apart(header)
    torn = 0
    while True:
        lines.taken.clear()
        row, reason = [], None
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            reason = f"not CSV: {e}"
            torn += 1
            if torn <= AGAIN:  # each time may read to the end of the file
                lines.give_back()
                reader = csv.reader(lines, delimiter=delimiter, strict=True)
        reason = reason or _reason(row, header, lines)
        yield lines.taken[0][0], None if reason else dict(zip(header, row, strict=True)), lines.raw, reason


def _delimiter(first: str) -> str:
    """What parts the header into most names: `;` is what a spreadsheet writes where the comma parts decimals."""
    parted = {d: next(csv.reader([first.replace("\r", "")], delimiter=d), []) for d in ",;\t|"}
    if len(parted[","]) == len(HEADLESS) and re.fullmatch("[A-D]", parted[","][-1].strip()):
        return ","  # no header, but a question, which may hold anything
    return max(parted, key=lambda d: len(parted[d]))


def _told_apart(header: list[str]) -> list[str]:
    """Names that stand there twice become `name`, `name.2`."""
    return [name if (n := header[:i].count(name)) == 0 else f"{name}.{n + 1}" for i, name in enumerate(header)]


def _reason(row: list[str], header: list[str], lines: _Lines) -> str | None:
    raw = lines.raw
    if not all(whole for _, _, whole in lines.taken):
        return "line too long: only its beginning was read"
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as e:
        return f"not UTF-8: byte {e.start + 1} is 0x{raw[e.start]:02x}"
    if not row:
        return "empty line"
    if len(row) != len(header):
        return f"not a row: {len(row)} fields, the header has {len(header)}"
    for bad in ("\0", "\ufffd"):
        if bad.encode() in raw:
            return DAMAGED[bad]
    return None

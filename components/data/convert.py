"""From records to rows: each becomes rows of the documented schema, or a line of the quarantine with its reason.

For every source, records read = records kept + records in quarantine. Files are worked on side by side, a large one in
parts, and what comes out depends on neither how many cores there were nor who was first.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

import orjson

from components.data import shapes, tables
from components.data.language import AUTO, named, of_row, of_sample
from components.data.mix import POLICY, Will
from components.data.readers import SPLITS, Part, Record, kind_of, records
from components.data.sources import hashed, split_of
from components.data.strict import Unfit

SAMPLE = 64  # records by which a file's shape is told,
SAMPLE_BYTES = 1 << 22  # or as many as are in so many bytes
RAW = 2_000  # characters of a record that the quarantine shows
SUBJECT = 200  # characters; a longer subject is named by its beginning and its hash
BLOCK = 1 << 25  # bytes of a large file that are one piece of work
TALLY = "tally.json"
OWN = {"id", "source", "licence", "license", "provenance", "url", "lang", "language", "object", "split", "line"}
GIVEN = (  # the later one counts
    ("source", "source"),
    ("license", "licence"),
    ("licence", "licence"),
    ("url", "provenance"),
    ("provenance", "provenance"),
)
ROW = orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE

Row = dict[str, Any]


class Job(NamedTuple):
    """A file, or a part of it. `name` is its path as rows name it; `held` the split that its name says."""

    path: Path
    name: str
    part: Part | None
    table: str | None
    held: str | None


class Origin(NamedTuple):
    """What a source says of all its rows. `version` is what was read where a file's name does not tell it."""

    label: str
    version: str | None
    shape: str | None
    licence: str
    lang: str | None
    split: str
    will: Will


class Work(NamedTuple):
    """A piece of work: some files of a source, and the folder for what comes of them."""

    jobs: list[Job]
    origin: Origin
    out: Path


class Tally(NamedTuple):
    """Records read, kept and turned away; rows by (shape, table), by split and by licence; the quarantine by kind of
    reason."""

    read: int
    kept: int
    rows: Counter[tuple[str, str]]
    splits: Counter[str]
    licences: Counter[str]
    reasons: Counter[str]

    @property
    def quarantined(self) -> int:
        return sum(self.reasons.values())

    def __add__(self, other: Any) -> "Tally":
        return Tally(*(a + b for a, b in zip(self, other, strict=True)))


NOTHING = Tally(0, 0, Counter(), Counter(), Counter(), Counter())


def held_split(name: str) -> str | None:
    """test or val where a file's name or one of its folders' says so; None for train, which is cut by hash."""
    *folders, file = name.lower().split("/")
    words = [*folders, *re.split(r"[^a-z]+", file)]
    found = [SPLITS[w] for w in words if w in SPLITS]
    return found[-1] if found and found[-1] != "train" else None


def parts_of(path: Path, block: int = BLOCK) -> Iterator[Part | None]:
    """A file as pieces of work of about `block` bytes; [None] for one that is read in one go. Lines stay whole."""
    kind, packed = kind_of(path.name)
    if packed is None and kind == "parquet" and path.stat().st_size > block:
        yield from _row_groups(path)
    elif packed is None and kind in ("jsonl", "text") and path.stat().st_size > 2 * block:
        start, line = 0, 1
        with path.open("rb") as f:
            while read := f.read(block):
                size, ended = len(read), read.count(b"\n")
                while more := f.readline(block):
                    size += len(more)
                    if more[-1:] == b"\n":
                        ended += 1
                        break
                yield Part(start, start + size, line)
                start, line = start + size, line + ended
    else:
        yield None


def _row_groups(path: Path) -> Iterator[Part | None]:
    try:
        counts = tables.groups_of(path)
    except tables.errors():
        yield None  # whoever reads it says what is the matter
        return
    line = 1
    for i, count in enumerate(counts):
        yield Part(i, i + 1, line)
        line += count


def read(work: Work) -> None:
    """Convert the files into the folder: one .jsonl a table, quarantine.jsonl, and the tally."""
    shutil.rmtree(work.out, ignore_errors=True)  # a cluster may do a piece again
    tally = NOTHING
    with Out(work.out) as files:
        for job in work.jobs:
            found, sample = opened(job.path, job.name, job.part)
            tally += convert(found, sample, work.origin, job.table, job.held, files)
    rows = [[*key, n] for key, n in tally.rows.items()]
    (work.out / TALLY).write_bytes(orjson.dumps(tally._asdict() | {"rows": rows}))


def tally_of(out: Path) -> Tally:
    """What `read` left in a folder."""
    told = orjson.loads((out / TALLY).read_bytes())
    rows = Counter({(shape, table): n for shape, table, n in told["rows"]})
    return Tally(told["read"], told["kept"], rows, *(Counter(told[k]) for k in ("splits", "licences", "reasons")))


class Out:
    """The files of one piece of work, each opened when its first row comes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.open: dict[str, IO[bytes]] = {}

    def __enter__(self) -> "Out":
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        for f in self.open.values():
            f.close()

    def write(self, name: str, line: bytes) -> None:
        f = self.open.get(name)
        if f is None:
            f = self.open[name] = (self.folder / f"{name}.jsonl").open("ab", buffering=1 << 20)
        f.write(line)


def opened(path: Path, name: str | None, part: Part | None) -> tuple[Iterator[Record], list[Any]]:
    """The records of a file or a part of it, and the values of the file's first ones."""
    found, sample = sampled(records(path, name, part))
    if part is not None and part.line > 1:
        _, sample = sampled(records(path, name))
    return found, sample


def sampled(found: Iterator[Record]) -> tuple[Iterator[Record], list[Any]]:
    """The records, and the values of the first ones."""
    first: list[Record] = []
    size = 0
    for record in found:
        first.append(record)
        size += len(record.raw)
        if len(first) >= SAMPLE or size > SAMPLE_BYTES:
            break
    return chain(first, found), [r.value for r in first if r.reason is None]


def convert(
    found: Iterator[Record], sample: list[Any], origin: Origin, table: str | None, held: str | None, files: Out
) -> Tally:
    """Write the rows of `found`. Shape and language are the recipe's, else those of the sample; where it has no shape,
    it is told record by record."""
    shape, reason = origin.shape, ""
    told = origin.lang if origin.lang not in (None, AUTO) else of_sample(sample)
    if shape is None and sample:
        try:
            shape = shapes.detect(sample)
        except Unfit as e:
            reason = str(e)
    read = kept = 0
    rows: Counter[tuple[str, str]] = Counter()
    splits: Counter[str] = Counter()
    licences: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for record in found:
        read += 1
        try:
            if record.reason is not None:
                raise Unfit(record.reason)
            name, made = _made(record, shape, reason, origin, told, table, held)
        except Unfit as e:
            why = str(e)
            kind = why.partition(":")[0]
            reasons[kind] += 1
            files.write("quarantine", quarantined(record, why, origin.label))
            continue
        kept += 1
        for of_table, row in made:
            files.write(of_table, to_line(row))
            rows[name, of_table] += 1
            splits[row["split"]] += 1
            licences[row["licence"]] += 1
    return Tally(read, kept, rows, splits, licences, reasons)


def _made(
    record: Record, shape: str | None, reason: str, origin: Origin, told: str, table: str | None, held: str | None
) -> tuple[str, list[tuple[str, Row]]]:
    value = record.value
    place = f"{record.file}:{record.line}"
    own = value if type(value) is dict and not OWN.isdisjoint(value) else {}
    common = _common(own, place, record, origin)
    if away := origin.will.against(place, own, common["source"], common["licence"], common["id"]):
        raise _Away(away)
    if shape is None:
        name = shapes.name_of(value)
        if name is None:
            raise Unfit(reason or shapes.no_shape(value))
    else:
        name = shape
    name, made = (name, shapes.rows(name, value)) if origin.shape else shapes.fitted(name, value)
    if table is not None:
        made = [shapes.to_table(*row, table) for row in made]
    says = _named(own, origin)
    found = []
    for i, (of_table, fields) in enumerate(made, start=1):
        row = {**common, **fields}
        row["lang"] = says or (of_row(row, told) if origin.lang == AUTO else told)
        if i > 1:
            row["id"] = f"{common['id']}/{i}"
        _place(row, own, of_table, origin, held)
        found.append((of_table, row))
    return name, found


class _Away(Unfit):
    """Left out by the recipe's will."""


def _common(own: Row, place: str, record: Record, origin: Origin) -> Row:
    """The fields that every row has, but for language, object and split."""
    row = {
        "id": place,
        "source": origin.label,
        "licence": origin.licence,
        "provenance": f"{origin.version}: {place}" if origin.version else f"{record.file}, line {record.line}",
        "line": place,
    }
    if not own:
        return row
    whole = "provenance" in own and "object" in own  # a row of forja's, whose id is known elsewhere
    if isinstance(own.get("id"), str | int) and not isinstance(own["id"], bool) and str(own["id"]).strip():
        row["id"] = own["id"] if whole else f"{record.file}/{own['id']}"
    for key, into in GIVEN:
        given = own.get(key)
        if isinstance(given, str) and given.strip():
            row[into] = given
    if whole and isinstance(own.get("line"), str):
        row["line"] = own["line"]
    return row


def _named(own: Row, origin: Origin) -> str | None:
    """The language that a record itself names."""
    if isinstance(own.get("lang"), str):
        return named(own["lang"])
    if origin.lang in (None, AUTO) and isinstance(own.get("language"), str):
        said = named(own["language"])
        return said if re.fullmatch("[a-z]{2}", said) else None
    return None


def _place(row: Row, own: Row, table: str, origin: Origin, held: str | None) -> None:
    """What the row is about, and its split: the recipe's, the row's own, the file's, or by hash. A question with
    choices is never trained on."""
    said = own.get("object")
    about = said if isinstance(said, str) and said.strip() else _subject(table, row) or row["id"]
    row["object"] = about
    given = SPLITS.get(own["split"].lower()) if isinstance(own.get("split"), str) else None
    if origin.split not in ("auto", "hash"):
        row["split"] = origin.split
    elif origin.split == "auto" and (given or held):
        row["split"] = given or held
    else:
        by_hash = split_of(about)
        row["split"] = "test" if table == "eval" and by_hash == "train" else by_hash


def _subject(table: str, row: Row) -> str:
    """What a bare row is about, so that a question stays in one split over the tables: its first turn. A document is
    about itself: its copies stay together, and its split does not depend on what stands before it."""
    if table == "corpus":
        return f"text {hashed(row['text']):016x}"
    text: str = f"choice: {row['question']}" if table == "eval" else row["messages"][0]["content"]
    return text if len(text) <= SUBJECT else f"{text[:SUBJECT]}… {hashed(text):016x}"


def to_line(row: Row) -> bytes:
    """A row as a line of JSON. Numbers beyond 64 bits, and dates in a tool's arguments, take the slower way."""
    try:
        return orjson.dumps(row, option=ROW)
    except TypeError:
        return json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n"


def quarantined(record: Record, reason: str, source: str) -> bytes:
    """A line of the quarantine. Of what the recipe leaves out the text is not kept: who opted out is not stored."""
    raw = b"" if reason.partition(":")[0] in POLICY else record.raw[: 4 * RAW]
    if not raw and record.value is not None and reason.partition(":")[0] not in POLICY:
        raw = tables.as_text(record.value)[: 4 * RAW]
    text = raw.decode("utf-8", "backslashreplace")[:RAW]
    row = {"file": record.file, "line": record.line, "reason": reason, "raw": text, "source": source}
    return orjson.dumps(row, option=ROW)

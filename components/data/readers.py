"""Files as records: what stands in them one by one, with its place, and for what cannot be read the reason.

Text is read in pieces, JSONL by lines, JSON by its values, CSV and TSV by rows, Parquet and Arrow by rows; plain or as
.gz, .bz2, .xz or .zst; and the members of .zip and .tar, which are never written to disk. Everything streams: a file's
size does not show in memory. After a broken container one last record says so, and what was read before it counts.
"""

import codecs
import glob
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, Any, NamedTuple

from components.artifact import ForjaError
from components.data import archives, jsonfile, tables
from components.data.strict import Unfit, check, loads

LINE = 1 << 26  # bytes; a longer line or value is turned away
WHOLE = 20_000  # bytes; a longer text is cut between paragraphs into pieces of about
PIECE = 3_000
RAW = 2_000  # bytes of a line too long that are kept as its raw
PACKED = {".gz": "gz", ".bz2": "bz2", ".xz": "xz", ".zst": "zst"}
KINDS = {
    **dict.fromkeys((".txt", ".md", ".text"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    **{".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".arrow": "arrow"},
    **{".zip": "zip", ".tar": "tar", ".tgz": "tar"},
}
TEXTS = ("text", "jsonl", "json", "csv", "tsv")
SPLITS = {"train": "train", "test": "test", "dev": "val", "val": "val", "valid": "val", "validation": "val"}
ABOUT = re.compile(r"(?:^|[_.-])(?:readme|licen[cs]e|notice|changelog)(?:[_.-]|$)", re.IGNORECASE)
SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")  # what `datasets` writes beside the rows


class Record(NamedTuple):
    """One thing read from `file`. `line` is the line where it begins, or its number from 1 in a table or a .json file.

    With a `reason` it could not be read, and has no value. `raw` is empty where the file holds no text for it.
    """

    file: str
    line: int
    value: Any | None
    raw: bytes
    reason: str | None


class Part(NamedTuple):
    """A part of a large file: the lines that begin in bytes `start` to `stop`, the first of them number `line`; of a
    Parquet file the row groups `start` to `stop`."""

    start: int
    stop: int
    line: int


def kind_of(name: str) -> tuple[str | None, str | None]:
    """(kind, compression) by a file's name. A split's name may follow: `pairs.txt.dev` is text."""
    suffixes = [s.lower() for s in PurePosixPath(name).suffixes]
    packed = PACKED.get(suffixes.pop()) if suffixes and suffixes[-1] in PACKED else None
    if name.lower().endswith(".tgz"):
        packed = "gz"
    if len(suffixes) > 1 and suffixes[-1] not in KINDS and suffixes[-1][1:] in SPLITS:
        suffixes.pop()
    return (KINDS.get(suffixes[-1]) if suffixes else None), packed


def files_of(source: str | Path) -> list[Path]:
    """The files of a source (a file, a folder, a glob, a folder saved by `datasets`), sorted.

    A folder's hidden files, read-mes and licences, and files of other kinds, are no data. Raises ForjaError where there
    is nothing to read.
    """
    path = Path(source)
    if path.is_file():
        if kind_of(path.name)[0] is None:
            raise ForjaError(f"{source}: its ending is none of {', '.join([*KINDS, *PACKED])}; rename the file")
        return [path]
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.is_file() and _is_data(p.relative_to(path))]
        found = _saved(found)
    elif glob.has_magic(str(source)):
        found = [Path(p) for p in glob.glob(str(source), recursive=True)]
        found = [p for p in found if p.is_file() and _is_data(Path(p.name))]
    else:
        raise ForjaError(f"{source}: no such file or folder; give one, a glob, hf:org/name or python-docs")
    if not found:
        raise ForjaError(f"{source}: holds no data; files that end in {', '.join(KINDS)} are read")
    return sorted(found)


def passed_over(source: str | Path) -> Counter[str]:
    """The endings of a folder's files that are of no kind that is read, but for hidden ones, read-mes and licences."""
    folder = Path(source)
    inside = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()] if folder.is_dir() else []
    known = [p for p in inside if any(part.startswith(".") for part in p.parts) or ABOUT.search(p.name)]
    rest = set(inside).difference(known)
    return Counter(p.suffix.lower() or p.name for p in sorted(rest) if kind_of(p.name)[0] is None)


def shown(name: str) -> str:
    """A file's name as text: bytes that are no UTF-8 are written out."""
    return name.encode("utf-8", "backslashreplace").decode()


def _is_data(path: PurePath) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.name not in SAVED and kind_of(path.name)[0] is not None and not ABOUT.search(path.name)


def _saved(found: list[Path]) -> list[Path]:
    """Of a folder that `datasets` saved, only the files that its state.json names: others beside them are caches."""
    kept = []
    for path in found:
        state = path.parent / "state.json"
        if path.suffix == ".arrow" and state.is_file():
            try:
                names = {f["filename"] for f in json.loads(state.read_bytes())["_data_files"]}
            except (ValueError, KeyError, TypeError):
                names = {path.name}
            if path.name not in names:
                continue
        kept.append(path)
    return kept


def records(path: Path, name: str | None = None, part: Part | None = None) -> Iterator[Record]:
    """The records of one file, or of a part of it. `name` is what they say as their file."""
    name = shown(path.as_posix()) if name is None else name
    kind, packed = kind_of(path.name)
    yield from _guarded(name, _of_path(path, name, kind, packed, part), part.line if part else 1)


def _guarded(name: str, read: Iterator[Record], line: int) -> Iterator[Record]:
    """Records up to the place where the container breaks, and there one that says so."""
    try:
        for record in read:
            line = record.line + 1
            yield record
    except (*archives.errors(), *tables.errors()) as e:
        why = " ".join(str(e).split())[:200] or type(e).__name__
        yield Record(name, line, None, b"", f"broken file: {why}; what stands before was read")


def _of_path(path: Path, name: str, kind: str | None, packed: str | None, part: Part | None) -> Iterator[Record]:
    if kind in ("parquet", "arrow") and packed is None:
        groups = range(part.start, part.stop) if part else None
        for number, value in tables.rows(kind, path, groups, part.line if part else 1):
            yield _checked(name, number, value)
        return
    if kind == "zip" and packed is None:
        with path.open("rb") as f:
            yield from _members(name, f, "zip")
        return
    with path.open("rb") as raw, archives.unpacked(raw, packed) as f:
        yield from _of_stream(f, name, kind, part)


def _of_stream(f: IO[bytes], name: str, kind: str | None, part: Part | None = None) -> Iterator[Record]:
    if kind in TEXTS and _beginning(f) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        if part is None or part.line == 1:
            yield Record(name, 1, None, b"", "not UTF-8: the file is UTF-16; convert it by `iconv -f UTF-16 -t UTF-8`")
    elif kind == "text":
        yield from _pieces(name, lines(f, part), cut=part is not None)
    elif kind == "jsonl":
        yield from _jsonl(name, f, part)
    elif kind == "json":
        yield from _json(name, f)
    elif kind in ("csv", "tsv"):
        yield from _csv(name, f, "\t" if kind == "tsv" else ",")
    elif kind in ("parquet", "arrow"):
        for number, value in tables.rows(kind, tables.seekable(f), None, 1):
            yield _checked(name, number, value)
    elif kind in ("zip", "tar"):
        yield from _members(name, f, kind)
    else:
        raise ForjaError(f"{name}: its ending is none of {', '.join(KINDS)}; rename the file")


def _beginning(f: IO[bytes]) -> bytes:
    """A stream's first two bytes, which stay to be read."""
    found: bytes = f.peek(2)[:2]  # type: ignore[attr-defined]  # what is opened here can look ahead
    return found


def lines(f: IO[bytes], part: Part | None = None) -> Iterator[tuple[int, bytes, bool]]:
    """(number, line with its LF, whether it is whole). A line ends at LF alone; a byte order mark before the first one
    goes. Of a line over LINE bytes only the beginning is given."""
    number, left = 1, None
    if part is not None:
        number, left = part.line, part.stop - part.start
        f.seek(part.start)
    first, readline = number == 1, f.readline
    while left is None or left > 0:
        line = readline(LINE + 1)
        if not line:
            return
        size, whole = len(line), True
        if size > LINE and line[-1] != 10:
            whole, line = False, line[:RAW]
            while more := readline(LINE):
                size += len(more)
                if more[-1] == 10:
                    break
        if first:
            line, first = line.removeprefix(b"\xef\xbb\xbf"), False
        yield number, line, whole
        number += 1
        if left is not None:
            left -= size


def _jsonl(name: str, f: IO[bytes], part: Part | None) -> Iterator[Record]:
    for number, line, whole in lines(f, part):
        raw = line[:-1] if line[-1:] == b"\n" else line
        if raw[-1:] == b"\r":
            raw = raw[:-1]
        try:
            if not whole:
                raise Unfit(f"line too long: over {LINE:,} bytes")
            yield Record(name, number, loads(raw), raw, None)
        except Unfit as e:
            yield Record(name, number, None, raw, str(e))


def _json(name: str, f: IO[bytes]) -> Iterator[Record]:
    number = 0
    for line, raw, broken, alone in jsonfile.values(f, LINE):
        try:
            if broken:
                raise Unfit(broken)
            value = loads(raw)
        except Unfit as e:
            number += 1
            why = (
                f"{e} (line {line})" if ":" in str(e) else f"{e}: line {line}"
            )  # what stands before the colon is its kind
            yield Record(name, number, None, raw, why)
            continue
        spread = jsonfile.spread(value) if alone else [value]
        for one in spread:
            number += 1
            yield Record(name, number, one, raw if len(spread) == 1 else b"", None)


def _pieces(name: str, read: Iterator[tuple[int, bytes, bool]], cut: bool) -> Iterator[Record]:
    """A short text whole; a longer one in pieces of whole paragraphs, which joined are the text again.

    A paragraph ends with its blank lines. One over WHOLE bytes is cut between lines.
    """
    piece: list[bytes] = []
    paragraph: list[bytes] = []
    start = begin = 1  # where piece and paragraph begin
    size = length = 0
    held: list[tuple[int, list[bytes]]] | None = None if cut else []  # finished pieces of what may stay whole
    total, ended = 0, False
    for number, line, whole in read:
        if not whole:
            yield Record(name, number, None, line, f"line too long: over {LINE:,} bytes")
            continue
        blank = not line.strip()
        if paragraph and ((ended and not blank) or length + len(line) > WHOLE):
            if piece and size + length > PIECE:
                if held is None:
                    yield _text(name, start, piece)
                else:
                    held.append((start, piece))
                piece, size = [], 0
            if not piece:
                start = begin
            piece += paragraph
            size, paragraph, length = size + length, [], 0
        if not paragraph:
            begin = number
        paragraph.append(line)
        length, ended, total = length + len(line), blank, total + len(line)
        if held is not None and total > WHOLE:
            yield from (_text(name, *h) for h in held)
            held = None
    rest = [(begin, paragraph)] if paragraph else []
    if piece and (size + length <= PIECE or not paragraph):
        rest = [(start, piece + paragraph)]
    elif piece:
        rest = [(start, piece), *rest]
    if held is not None:  # it was short
        everything = [line for _, found in (*held, *rest) for line in found]
        rest = [(1, everything)] if everything else []
    yield from (_text(name, *r) for r in rest)


def _text(name: str, line: int, piece: list[bytes]) -> Record:
    raw = b"".join(piece)
    try:
        text = raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        at = line + raw.count(b"\n", 0, e.start)
        byte = e.start - raw.rfind(b"\n", 0, e.start)
        return Record(name, line, None, raw, f"not UTF-8: byte {byte} of line {at} is 0x{raw[e.start]:02x}")
    return _checked(name, line, text, raw)


def _csv(name: str, f: IO[bytes], delimiter: str) -> Iterator[Record]:
    for line, value, raw, reason in tables.csv_rows(lines(f), delimiter):
        yield Record(name, line, value, raw, reason)


def _members(name: str, f: IO[bytes], kind: str) -> Iterator[Record]:
    """The records of an archive's members, `a.zip!b.csv` being the file; a member turned away is one record."""
    for member, opened, reason in archives.members(f, kind):
        whole, (inner, packed) = f"{name}!{shown(member)}", kind_of(member)
        if opened is None:
            yield Record(whole, 0, None, b"", reason)
        elif inner in ("zip", "tar"):
            yield Record(whole, 0, None, b"", "archive: an archive within an archive is not read")
        elif _is_data(PurePosixPath(member)):
            yield from _guarded(whole, _of_stream(archives.unpacked(opened, packed), whole, inner), 1)


def _checked(name: str, line: int, value: Any, raw: bytes = b"") -> Record:
    if isinstance(value, bytes):  # a row that Arrow could not decode, and why
        return Record(name, line, None, b"", value.decode())
    try:
        check(value)
    except Unfit as e:
        return Record(name, line, None, raw or tables.as_text(value), str(e))
    return Record(name, line, value, raw, None)

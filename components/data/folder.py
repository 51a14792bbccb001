"""A person's own folder as a source: corpus/, instructions/, preferences/, prompts/ and eval/ with .txt and .jsonl.

Rows may be bare: what they lack (id, source, licence, provenance, lang, object, split) is filled in, and the short
forms {"instruction", "response"} and {"prompt", "chosen", "rejected"} become messages. A line that is no JSON object is
passed on byte for byte, so that `validate` rejects it with file, line and reason.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.artifact import ForjaError
from components.data.rules import Row, Unfit, parse
from components.data.sources import chunks, split_of

TABLES = ("corpus", "instructions", "preferences", "prompts", "eval")
LAYOUT = "corpus/*.txt or *.jsonl, and optionally instructions/, preferences/, prompts/ and eval/ with *.jsonl"
WHOLE_CHARS = 20_000  # a longer text is cut between paragraphs into documents of
CHUNK_CHARS = 3000


def read_folder(source: str, out: Path) -> dict[str, float]:
    """Copy the tables of the folder `source` under `out`, with the missing fields filled. Returns rows by table.

    Raises ForjaError when there is no such folder, or nothing in it of the layout.
    """
    root = Path(source)
    if not root.is_dir():
        raise ForjaError(f"source: {source} is neither python-docs nor a folder; give a folder with {LAYOUT}")
    counts = {}
    for table in TABLES:
        files = sorted(p for p in (root / table).rglob("*") if p.is_file())
        n = 0
        for path in files:
            name = path.relative_to(root).as_posix()
            target = out / name
            if path.suffix == ".jsonl":
                n += _write(target, (_filled(table, name, i, line) for i, line in _lines(path)))
            elif path.suffix == ".txt" and table == "corpus":
                n += _write(target.with_name(target.name + ".jsonl"), _documents(name, path))
        counts[f"{table}.rows"] = float(n)
    if not any(counts.values()):
        raise ForjaError(f"source: {source} holds no data; it needs {LAYOUT}")
    return counts


def _write(path: Path, lines: Iterator[bytes]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as f:
        return sum(1 for line in lines if f.write(line + b"\n"))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines with their numbers from 1; cut at LF only. The empty end after a last LF is no line."""
    with path.open("rb") as f:
        for i, line in enumerate(f, start=1):
            yield i, line.removesuffix(b"\n").removesuffix(b"\r")


def _documents(name: str, path: Path) -> Iterator[bytes]:
    """The rows of a text file: the whole, or pieces cut between paragraphs, each with a split of its own. Bytes that
    are no UTF-8 become U+FFFD, which `validate` rejects."""
    text = path.read_bytes().decode("utf-8", errors="replace").removeprefix("\ufeff").replace("\r\n", "\n").strip()
    pieces = chunks(text, CHUNK_CHARS) if len(text) > WHOLE_CHARS else [text]
    for i, piece in enumerate(pieces, start=1):
        group = name if len(pieces) == 1 else f"{name}:{i}"
        yield _line({"text": piece} | _missing({}, name, i, group))


def _filled(table: str, name: str, number: int, line: bytes) -> bytes:
    """`line` with its missing fields, or as it stands when it is no sound JSON object or has them all."""
    try:
        row = parse(line)
    except Unfit:
        return line
    whole = _long_form(table, row)
    filled = whole | _missing(whole, name, number, group=_subject(table, whole) or f"{name}:{number}")
    return line if filled == row else _line(filled)


def _line(row: Row) -> bytes:
    return json.dumps(row, sort_keys=True, ensure_ascii=False).encode()


def _missing(row: Row, name: str, number: int, group: str) -> dict[str, Any]:
    group = row["object"] if isinstance(row.get("object"), str) and row["object"] else group
    defaults = {
        "id": f"{name}:{number}",
        "source": name,
        "licence": "unknown",
        "provenance": f"{name}, line {number}",
        "lang": "en",
        "object": group,
        "split": split_of(group),
    }
    return {k: v for k, v in defaults.items() if k not in row}


def _long_form(table: str, row: Row) -> dict[str, Any]:
    """The row with {"instruction", "response"} or {"prompt", "chosen", "rejected"} as messages."""
    row = dict(row)
    if "messages" not in row and table != "corpus":
        for key in ("instruction", "prompt"):
            if isinstance(row.get(key), str):
                row["messages"] = [{"role": "user", "content": row.pop(key)}]
                break
        if table == "instructions" and "messages" in row and isinstance(row.get("response"), str):
            row["messages"].append({"role": "assistant", "content": row.pop("response")})
    if table == "preferences":
        for key in ("chosen", "rejected"):
            if isinstance(row.get(key), str):
                row[key] = {"role": "assistant", "content": row[key]}
        row.setdefault("kind", "wrong")
    return row


def _subject(table: str, row: Row) -> str:
    """What a bare row is about, so that a question stays in one split over the tables: its first turn, or ""."""
    messages = row.get("messages")
    first = messages[0] if isinstance(messages, list) and messages else {}
    text = row.get("question") if table == "eval" else first.get("content") if isinstance(first, dict) else ""
    return text if isinstance(text, str) else ""

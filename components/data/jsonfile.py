"""The values of a .json file, one after another and without reading it whole.

An array gives its elements; values that follow each other (JSONL under another name, or written over several lines) are
given one by one; an object of arrays gives what the arrays hold. The cuts are found by brackets and strings alone, and
whoever reads a value judges it, so that one broken element costs only itself.
"""

import re
from collections.abc import Generator, Iterator
from typing import IO, Any, NamedTuple

CHUNK = 1 << 20
# All that stands before the next bracket, strings whole; and the same before the next bracket or comma.
WITHIN = re.compile(rb'(?:[^"\[\]{}]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+', re.DOTALL)
BETWEEN = re.compile(rb'(?:[^"\[\]{},]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+', re.DOTALL)
SPACE = re.compile(rb"[ \t\r\n]*+")
SCALAR = re.compile(rb'[^ \t\r\n\[\]{},"]*+')
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
QUOTE, OPENS, CLOSES, ENDS = b'"'[0], b"[{", b"}"[0], b"]"[0]


class Found(NamedTuple):
    """The line where a value begins, its bytes, why it is none, and whether it is all that the file holds."""

    line: int
    raw: bytes
    reason: str | None
    alone: bool = False


class _Buffer:
    """The bytes from `start` on, and how many lines ended before."""

    def __init__(self, f: IO[bytes], limit: int):
        self.f, self.limit = f, limit
        self.data, self.start, self.line, self.ended = b"", 0, 1, False
        self.more()
        self.data = self.data.removeprefix(b"\xef\xbb\xbf")

    def more(self) -> bool:
        """Read on, keeping what stands from `start`; False at the end of the file."""
        if self.ended:
            return False
        kept = self.data[self.start :]
        chunk = self.f.read(max(CHUNK, len(kept)))
        self.data, self.start, self.ended = kept + chunk, 0, not chunk
        return not self.ended

    def to(self, at: int) -> None:
        self.line += self.data.count(b"\n", self.start, at)
        self.start = at

    def skip(self) -> bytes:
        """Pass over space; the byte that follows, b"" at the end."""
        while True:
            found = SPACE.match(self.data, self.start)
            assert found is not None  # noqa: S101
            self.to(found.end())
            if self.start < len(self.data) or not self.more():
                return self.data[self.start : self.start + 1]

    def token(self, at: int, before: re.Pattern[bytes]) -> tuple[int, int]:
        """The next bracket, or comma, from `start` + `at` on: (its byte, where it stands). -1 at the end of the file,
        or beyond the limit."""
        while True:
            found = before.match(self.data, self.start + at)
            assert found is not None  # noqa: S101
            end = found.end()
            if end < len(self.data) and self.data[end] != QUOTE:
                return self.data[end], end - self.start
            at = end - self.start  # a string that does not end in the buffer begins here
            if len(self.data) - self.start > self.limit or not self.more():
                return -1, len(self.data) - self.start


def values(f: IO[bytes], limit: int) -> Iterator[Found]:
    """Every value; the reason is None where the brackets fit. One that is never closed, or that does not end within
    `limit` bytes, is the last."""
    buffer = _Buffer(f, limit)
    number = 0
    while first := buffer.skip():
        number += 1
        if first == b"[":
            closed = yield from _elements(buffer)
            if not closed:
                return
        elif first in b"]},":
            line, raw = buffer.line, _rest(buffer)
            yield Found(line, raw, f"not JSON: {first.decode()!r} stands where a value should")
            return
        else:
            line, size, whole = buffer.line, *_extent(buffer)
            raw = buffer.data[buffer.start : buffer.start + size]
            if not whole:
                yield Found(line, raw, _unclosed(buffer))
                return
            buffer.to(buffer.start + size)
            yield Found(line, raw, _too_long(raw, limit), alone=number == 1 and not buffer.skip())


def _extent(buffer: _Buffer) -> tuple[int, bool]:
    """How many bytes the value at `start` takes, and whether it ends."""
    first = buffer.data[buffer.start : buffer.start + 1]
    if first not in (b"{", b"[", b'"'):
        while True:
            found = SCALAR.match(buffer.data, buffer.start)
            assert found is not None  # noqa: S101
            if found.end() < len(buffer.data) or len(found[0]) > buffer.limit or not buffer.more():
                return len(found[0]), len(found[0]) <= buffer.limit
    if first == b'"':
        return _string(buffer)
    depth = at = 0
    while True:
        token, at = buffer.token(at, WITHIN)
        if token < 0:
            return at, False
        depth, at = depth + (1 if token in OPENS else -1), at + 1
        if depth == 0:
            return at, True


def _string(buffer: _Buffer) -> tuple[int, bool]:
    while True:
        found = STRING.match(buffer.data, buffer.start)
        if found is not None:
            return len(found[0]), True
        if len(buffer.data) - buffer.start > buffer.limit or not buffer.more():
            return len(buffer.data) - buffer.start, False


def _elements(buffer: _Buffer) -> Generator[Found, None, bool]:
    """The elements of the array at `start`; returns whether it was closed."""
    buffer.to(buffer.start + 1)
    several = False
    while True:
        if buffer.skip() == b"]" and not several:
            buffer.to(buffer.start + 1)
            return True
        line, depth, at = buffer.line, 0, 0
        while True:
            token, at = buffer.token(at, WITHIN if depth else BETWEEN)
            if token < 0 or (depth == 0 and token not in OPENS):
                break
            depth, at = depth + (1 if token in OPENS else -1), at + 1
        raw = buffer.data[buffer.start : buffer.start + at].rstrip(b" \t\r\n")
        if token < 0 or token == CLOSES:
            yield Found(line, raw, _unclosed(buffer))
            return False
        yield Found(line, raw, _too_long(raw, buffer.limit) if raw else "not JSON: nothing stands beside a comma")
        buffer.to(buffer.start + at + 1)
        several = True
        if token == ENDS:
            return True


def _too_long(raw: bytes, limit: int) -> str | None:
    return f"value too long: over {limit:,} bytes" if len(raw) > limit else None


def _unclosed(buffer: _Buffer) -> str:
    if len(buffer.data) - buffer.start > buffer.limit:
        return f"value too long: over {buffer.limit:,} bytes, or never closed; what follows is not read"
    return "not JSON: a bracket or string is never closed"


def _rest(buffer: _Buffer) -> bytes:
    return buffer.data[buffer.start : buffer.start + CHUNK]


def spread(value: Any) -> list[Any]:
    """What a value of a .json file holds: itself; or the rows of an object of arrays or of objects, by row or by
    column; or the questions of SQuAD's articles."""
    from components.data.shapes import name_of

    if not isinstance(value, dict) or not value or name_of(value) is not None:
        return [value]
    arrays = [v for v in value.values() if isinstance(v, list) and v]
    nested = [v for v in value.values() if isinstance(v, dict)]
    if arrays and not nested and all(isinstance(x, dict) for v in arrays for x in v):
        return [question for rows in arrays for row in rows for question in _questions(row)]
    if len(arrays) == len(value) and len({len(v) for v in arrays}) == 1:
        return [dict(zip(value, row, strict=True)) for row in zip(*arrays, strict=True)]
    if len(nested) == len(value) and nested[0]:
        if all(name_of(v) is not None for v in nested):  # rows by their ids
            return nested
        if all(v.keys() == nested[0].keys() for v in nested) and all(
            k.isdecimal() for k in nested[0]
        ):  # as pandas does
            return [{name: column[k] for name, column in value.items()} for k in nested[0]]
    return [value]


def _questions(article: dict[str, Any]) -> list[Any]:
    """Each question of an article of SQuAD with its paragraph, and the article as what it is about; else the row."""
    try:
        return [
            {**asked, "context": paragraph["context"], "object": article.get("title") or paragraph["context"]}
            for paragraph in article["paragraphs"]
            for asked in paragraph["qas"]
        ] or [article]
    except (KeyError, TypeError):
        return [article]

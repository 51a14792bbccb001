"""JSON read strictly and fast: what a lenient reader would accept or change is refused, with the reason.

NaN, infinity, a key given twice, bytes that are no UTF-8, half of a surrogate pair, a NUL, and nesting beyond DEPTH are
refused. orjson reads the common case, and this module looks over its result for the three things that orjson lets
through (a key twice, an integer beyond 64 bits, a NUL); where one of them is possible, Python's own reader decides.
"""

import json
import math
import re
from typing import Any

import orjson

DEPTH = 200
BIG = 2.0**63  # from here on orjson makes floats of integers
DAMAGE = re.compile("[\0\ud800-\udfff\ufffd]")
DAMAGED = {"\0": "damaged text: NUL", "\ufffd": "damaged text: U+FFFD stands where bytes were lost"}
SPACED = re.compile(rb'"[ \t\r\n]+:')


class Unfit(ValueError):
    """A row or line that breaks a rule; its text is the reason: a kind, a colon, and what exactly."""


class _Doubt(Exception):
    """The fast reader cannot tell; the slow one decides."""


def loads(line: bytes) -> Any:
    """The value of one JSON text. Raises Unfit."""
    try:
        value = orjson.loads(line)
        keys = _look(value, 1)
    except (orjson.JSONDecodeError, RecursionError, _Doubt):
        return _slowly(line)
    # As many `":` as keys, and none with a space between: then no key was given twice.
    if keys and (line.count(b'":') != keys or SPACED.search(line)):
        return _slowly(line)
    return value


def check(value: Any) -> None:
    """Raise Unfit for damaged text anywhere in a value that came from a table."""
    if isinstance(value, str):
        if bad := DAMAGE.search(value):
            raise Unfit(DAMAGED.get(bad[0], "damaged text: half of a surrogate pair"))
    elif isinstance(value, dict):
        for k, v in value.items():
            check(k)
            check(v)
    elif isinstance(value, list):
        for v in value:
            check(v)


def _look(value: Any, depth: int) -> int:
    """The number of keys in `value`. Raises _Doubt for what needs a closer look."""
    kind = type(value)
    if kind is str:
        if "\0" in value or "\ufffd" in value:
            raise _Doubt
        return 0
    if kind is dict:
        if depth > DEPTH:
            raise _Doubt
        n = len(value)
        for k, v in value.items():
            if "\0" in k or "\ufffd" in k:
                raise _Doubt
            if type(v) is str:
                if "\0" in v or "\ufffd" in v:
                    raise _Doubt
            elif v is not None:
                n += _look(v, depth + 1)
        return n
    if kind is list:
        if depth > DEPTH:
            raise _Doubt
        return sum([_look(v, depth + 1) for v in value])
    if kind is float and not -BIG < value < BIG:
        raise _Doubt
    return 0


def _slowly(line: bytes) -> Any:
    if not line.strip():
        raise Unfit("empty line")
    try:
        text = line.decode("utf-8")
        value = json.loads(text, parse_constant=_constant, parse_float=_finite, object_pairs_hook=_pairs)
    except UnicodeDecodeError as e:
        raise Unfit(f"not UTF-8: byte {e.start + 1} is 0x{line[e.start]:02x}") from None
    except json.JSONDecodeError as e:
        raise Unfit(f"not JSON: {e.msg} at character {e.pos + 1}") from None
    except Unfit:
        raise
    except (RecursionError, ValueError):
        raise Unfit("not JSON: nested too deeply, or a number too long") from None
    _shallow(value, 1)
    check(value)
    return value


def _shallow(value: Any, depth: int) -> None:
    if isinstance(value, dict | list) and depth > DEPTH:
        raise Unfit(f"not JSON: nested too deeply, beyond {DEPTH} levels")
    if isinstance(value, dict):
        for v in value.values():
            _shallow(v, depth + 1)
    elif isinstance(value, list):
        for v in value:
            _shallow(v, depth + 1)


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise Unfit(f"not JSON: {number} is beyond a number's range")
    return value


def _constant(name: str) -> None:
    raise Unfit(f"not JSON: {name} is no JSON number")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        keys = [k for k, _ in pairs]
        raise Unfit(f"duplicate key: {next(k for k in keys if keys.count(k) > 1)!r}")
    return seen

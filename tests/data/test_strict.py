"""The fast reader of JSON against Python's own, made strict here in the plainest way."""

import json
import random
import re
from typing import Any

import pytest

from components.data.strict import DEPTH, Unfit, loads

PIECES = [b'"', b'":', b'\\"', b'" :', b"\\\\", b"{", b"}", b"[", b"]", b",", b":", b" ", b"\n", b"1", b"-0", b"1e400"]
PIECES += [b"NaN", b"Infinity", b"\\u0000", b"\\ud800", b"\\udc00", b"\xef\xbf\xbd", b"\\uFFFD", b"\x00", b"\xff"]
PIECES += [b"\xed\xa0\x80", b"12345678901234567890123", b"18446744073709551616", b'"a"', b'"b"', b'{"a":1,"a":2}']
PIECES += [b"true", b"null", b"01", b"1."]
LETTERS = ['"', "\\", ":", '":', "é", "\u2028", "😀", "a", " ", "/"]


def plainly(line: bytes) -> Any:
    """The value, or ValueError."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({k for k, _ in found}) < len(found):
            raise ValueError("a key twice")
        return dict(found)

    def finite(text: str) -> float:
        if float(text) in (float("inf"), float("-inf")):
            raise ValueError("infinite")
        return float(text)

    def constant(text: str) -> None:
        raise ValueError(text)

    value = json.loads(line.decode(), object_pairs_hook=pairs, parse_float=finite, parse_constant=constant)
    if re.search("[\0\ud800-\udfff\ufffd]", "".join(strings(value))):
        raise ValueError("damaged")
    return value


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [*value, *(s for v in value.values() for s in strings(v))]
    return (
        [s for v in value for s in strings(v)] if isinstance(value, list) else [value] if isinstance(value, str) else []
    )


def some(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(7 if depth < 4 else 5)
    if kind < 2:
        return "".join(rng.choice(LETTERS) for _ in range(rng.randrange(6)))
    if kind < 5:
        return rng.choice([None, True, 0, -1, 1.5, 2**64, -(2**63) - 1, 10**30, 1e300, 2**53 + 1])
    if kind == 5:
        return [some(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(["a", "b", '"', "c:", "\\"]) + "x" * i: some(rng, depth + 1) for i in range(rng.randrange(4))}


@pytest.mark.parametrize("seed", range(20))
def test_the_fast_reader_agrees_with_the_plain_one(seed: int) -> None:
    rng = random.Random(seed)
    accepted = 0
    for _ in range(400):
        separators = rng.choice([(",", ":"), (", ", ": "), (" ,", " : ")])
        line = json.dumps(some(rng), ensure_ascii=rng.random() < 0.5, separators=separators).encode()
        for _ in range(rng.choice([0, 0, 1, 2])):
            at = rng.randrange(len(line) + 1)
            line = line[:at] + rng.choice(PIECES) + line[at + rng.randrange(3) :]
        try:
            wanted = plainly(line)
        except ValueError:
            with pytest.raises(Unfit):
                loads(line)
            continue
        found = loads(line)
        assert (found, repr(found)) == (wanted, repr(wanted)), line
        accepted += 1
    assert 100 < accepted < 390


def test_depth() -> None:
    for n in (DEPTH, DEPTH + 1):
        for line in (b"[" * n + b"]" * n, b'{"a":' * n + b"1" + b"}" * n, b'{"a" :' * n + b"1" + b"}" * n):
            if n == DEPTH:
                assert loads(line)
            else:
                with pytest.raises(Unfit, match="nested too deeply"):
                    loads(line)

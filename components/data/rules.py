"""What one row of a table must be. The reason against a row is text: a kind, a colon, and what exactly."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, Field

LANGS = ("en", "es")
SPLITS = ("train", "val", "test")
KINDS = ("wrong", "cut", "off-topic")
DAMAGE = re.compile("[\0\ud800-\udfff\ufffd]")
DAMAGED = {"\0": "damaged text: NUL", "\ufffd": "damaged text: U+FFFD stands where bytes were lost"}
COMMON = ("id", "source", "licence", "provenance", "lang", "object", "split")

Row = Mapping[str, Any]


class Unfit(ValueError):
    """A row or line that breaks a rule; its text is the reason."""


class Limits(BaseModel, frozen=True, extra="forbid"):
    """One table's limits: characters of a row's content, and the share of read rows that may break a rule."""

    min_chars: int = Field(ge=1)
    max_chars: int = Field(ge=1)
    max_rejected_share: float = Field(ge=0, le=1)


def parse(line: bytes) -> Row:
    """The row that a line of JSONL holds. Raises Unfit for what is no JSON object in UTF-8, or is one only to a lenient
    reader: NaN, infinity, a key given twice, a NUL, half of a surrogate pair."""
    if not line.strip():
        raise Unfit("empty line")
    try:
        text = line.decode("utf-8")
        row = json.loads(text, parse_constant=_constant, parse_float=_finite, object_pairs_hook=_pairs)
    except Unfit:
        raise
    except UnicodeDecodeError as e:
        raise Unfit(f"not UTF-8: byte {e.start + 1} is 0x{line[e.start]:02x}") from None
    except json.JSONDecodeError as e:
        raise Unfit(f"not JSON: {e.msg} at character {e.pos + 1}") from None
    except (RecursionError, ValueError):
        raise Unfit("not JSON: nested too deeply, or a number too long") from None
    if not isinstance(row, dict):
        raise Unfit(f"not an object: a row is {{...}}, this is a {type(row).__name__}")
    for string in _strings(row):
        if bad := DAMAGE.search(string):
            raise Unfit(DAMAGED.get(bad[0], "damaged text: half of a surrogate pair"))
    return row


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for k, v in value.items():
            yield k
            yield from _strings(v)
    elif isinstance(value, list):
        for v in value:
            yield from _strings(v)


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


def check(table: str, row: Row, limits: Limits) -> None:
    """Raise Unfit, with the reason, when `row` breaks a rule of `table`."""
    for key in COMMON:
        _string(row, key)
    _one_of(row, "lang", LANGS)
    _one_of(row, "split", SPLITS)
    CHECKS[table](row)
    n = len(content(table, row))
    if n < limits.min_chars:
        raise Unfit(f"too short: {n} characters, at least {limits.min_chars}")
    if n > limits.max_chars:
        raise Unfit(f"too long: {n} characters, at most {limits.max_chars}")


def content(table: str, row: Row) -> str:
    """What a row says, as one text: two rows with the same content are duplicates. Case and spacing of a document do
    not count."""
    if table == "corpus":
        return " ".join(row["text"].casefold().split())
    if table == "eval":
        return "\n".join([row["question"], *row["choices"]])
    turns = [*row["messages"], *(row[k] for k in ("chosen", "rejected") if k in row)]
    return "\n".join(said(turn) for turn in turns)


def said(message: Row) -> str:
    """A message's text, with the calls it makes."""
    calls = [json.dumps(c, sort_keys=True, ensure_ascii=False) for c in message.get("tool_calls") or ()]
    return "\n".join([message["content"], *calls]).strip()


def _corpus(row: Row) -> None:
    _string(row, "text")


def _instructions(row: Row) -> None:
    last = _dialogue(row)
    if last["role"] != "assistant" or last.get("tool_calls"):
        raise Unfit("roles: an instruction ends with the assistant's answer")


def _preferences(row: Row) -> None:
    _prompts(row)
    _one_of(row, "kind", KINDS)
    for key in ("chosen", "rejected"):
        if key not in row:
            raise Unfit(f"missing field: {key}")
        _message(row[key], key)
        if row[key]["role"] != "assistant":
            raise Unfit(f"roles: {key} is the assistant's")
    if said(row["chosen"]) == said(row["rejected"]):
        raise Unfit("no preference: chosen and rejected are the same")


def _prompts(row: Row) -> None:
    if _dialogue(row)["role"] == "assistant":
        raise Unfit("roles: the dialogue ends before the assistant's turn")


def _eval(row: Row) -> None:
    _string(row, "question")
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or len(choices) != 4 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise Unfit("choices: four texts are needed")
    if len({" ".join(c.casefold().split()) for c in choices}) < 4:
        raise Unfit("choices: two of the four are the same")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer <= 3:
        raise Unfit(f"answer: {answer!r} is no index from 0 to 3")


CHECKS: dict[str, Callable[[Row], None]] = {
    "corpus": _corpus,
    "instructions": _instructions,
    "preferences": _preferences,
    "prompts": _prompts,
    "eval": _eval,
}


def _string(row: Row, key: str) -> None:
    if key not in row:
        raise Unfit(f"missing field: {key}")
    if not isinstance(row[key], str):
        raise Unfit(f"wrong type: {key} is no text")
    if not row[key].strip():
        raise Unfit(f"empty field: {key}")


def _one_of(row: Row, key: str, allowed: tuple[str, ...]) -> None:
    if row.get(key) not in allowed:
        raise Unfit(f"{key}: {row.get(key)!r} is none of {', '.join(allowed)}")


def _dialogue(row: Row) -> Row:
    """Check that the turns alternate, and return the last: user, assistant, user ... and after a call its result, a
    tool turn, then the assistant again."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Unfit("missing field: messages")
    before: Row = {"role": "assistant", "content": ""}
    for i, message in enumerate(messages, start=1):
        _message(message, f"message {i}")
        expected = {
            "user": "assistant",
            "tool": "assistant",
            "assistant": "tool" if before.get("tool_calls") else "user",
        }
        if message["role"] != expected[before["role"]]:
            raise Unfit(f"roles: message {i} is the {message['role']}'s, expected the {expected[before['role']]}'s")
        before = message
    return before


def _message(message: Any, where: str) -> None:
    if not isinstance(message, dict) or message.get("role") not in ("user", "assistant", "tool"):
        raise Unfit(f"roles: {where} has no role user, assistant or tool")
    if not isinstance(message.get("content"), str):
        raise Unfit(f"wrong type: {where} has no content text")
    calls = message.get("tool_calls")
    if calls is None:
        if not message["content"].strip():
            raise Unfit(f"empty field: {where} says nothing")
        return
    good = isinstance(calls, list) and calls and all(isinstance(c, dict) for c in calls)
    if message["role"] != "assistant" or not good:
        raise Unfit(f"tool calls: {where} is no assistant's list of calls")
    if not all(isinstance(c.get("name"), str) and isinstance(c.get("arguments"), dict) for c in calls):
        raise Unfit(f"tool calls: {where} has a call without name or arguments")

"""What one row of a table must be. The reason against a row is text: a kind, a colon, and what exactly."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, Field

from components.data.strict import Unfit, loads

LANGS = ("en", "es")
SPLITS = ("train", "val", "test")
KINDS = ("wrong", "cut", "off-topic", "garbled", "judged")  # of the last there is one answer, chosen or rejected
CHOICES = (2, 26)  # how many a question may have
COMMON = ("id", "source", "licence", "provenance", "lang", "object", "split")

Row = Mapping[str, Any]


class Limits(BaseModel, frozen=True, extra="forbid"):
    """One table's limits: characters of a row's content, the shares of read rows that may break a rule or be copies,
    and the share of one class among rows that have one: the place of the right choice, or the verdict on a single
    answer."""

    min_chars: int = Field(ge=1)
    max_chars: int = Field(ge=1)
    max_rejected_share: float = Field(ge=0, le=1)
    max_duplicate_share: float | None = Field(ge=0, le=1)
    max_class_share: float | None = Field(gt=0, le=1)


def parse(line: bytes) -> Row:
    """The row that a line of JSONL holds. Raises Unfit for what is no JSON object in UTF-8, or is one only to a lenient
    reader (strict.py)."""
    row = loads(line)
    if not isinstance(row, dict):
        raise Unfit(f"not an object: a row is {{...}}, this is a {type(row).__name__}")
    return row


def check(table: str, row: Row, limits: Limits) -> str:
    """The content of `row`. Raises Unfit, with the reason, when it breaks a rule of `table`."""
    for key in COMMON:
        _string(row, key)
    _one_of(row, "lang", LANGS)
    _one_of(row, "split", SPLITS)
    CHECKS[table](row)
    said = content(table, row)
    n = len(said)
    if n < limits.min_chars:
        raise Unfit(f"too short: {n} characters, at least {limits.min_chars}")
    if n > limits.max_chars:
        raise Unfit(f"too long: {n} characters, at most {limits.max_chars}")
    return said


def content(table: str, row: Row) -> str:
    """What a row says, as one text: two rows with the same content are duplicates. Case and spacing of a document do
    not count."""
    if table == "corpus":
        return " ".join(row["text"].casefold().split())
    if table == "eval":
        return "\n".join([row["question"], *row["choices"]])
    turns = [*row["messages"], *answers_of(row)]
    return "\n".join(said(turn) for turn in turns)


def answers_of(row: Row) -> list[Row]:
    """The answers that a preference compares, the better one first; of a judged one, that alone."""
    return [row[key] for key in ("chosen", "rejected") if row.get(key) is not None]


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
    answers = [key for key in ("chosen", "rejected") if row.get(key) is not None]
    wanted = 1 if row["kind"] == "judged" else 2
    if len(answers) != wanted:
        raise Unfit(
            f"missing field: chosen {'or' if wanted == 1 else 'and'} rejected; a {row['kind']} one has {wanted}"
        )
    for key in answers:
        _message(row[key], key)
        if row[key]["role"] != "assistant":
            raise Unfit(f"roles: {key} is the assistant's")
    if wanted == 2 and said(row["chosen"]) == said(row["rejected"]):
        raise Unfit("no preference: chosen and rejected are the same")


def _prompts(row: Row) -> None:
    if _dialogue(row)["role"] == "assistant":
        raise Unfit("roles: the dialogue ends before the assistant's turn")
    if "truth" in row:
        _string(row, "truth")


def _eval(row: Row) -> None:
    _string(row, "question")
    choices, answer = row.get("choices"), row.get("answer")
    few, many = CHOICES
    if (
        not isinstance(choices, list)
        or not few <= len(choices) <= many
        or not all(isinstance(c, str) and c.strip() for c in choices)
    ):
        raise Unfit(f"choices: {few} to {many} texts are needed")
    if len({" ".join(c.casefold().split()) for c in choices}) < len(choices):
        raise Unfit("choices: two of them are the same")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise Unfit(f"answer: {answer!r} is no index from 0 to {len(choices) - 1}")


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

"""What must not be trained on of a held-out row, and what a row that is trained on says.

Held out are the questions, alone and with their right answers, the longer choices, and every row of the test split.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

WHOLE = 8  # words of a text that counts alone
QUESTION = 5  # words of a question that counts without its answer
ANSWERED = 4  # words of a question with its answer
FREE = 16  # letters and digits of a text that is found however it is spaced; a shorter one only where it is as it was
FREE_QUESTION = 28  # of a question alone: asyncio.Queue.full is not asyncio.QueueFull

Row = Mapping[str, Any]
WORD = re.compile(r"\w+|(?<= )[-+*/](?= )")


class Held(NamedTuple):
    """A held-out text, the row that it belongs to, and from how many words on it counts as a whole."""

    owner: str
    text: str
    least: int
    free: int  # characters from which it is found however it is spaced
    asked: bool = False  # a question alone: one that several rows ask does not count


HELD = pa.schema(
    {"owner": pa.string(), "text": pa.large_string(), "least": pa.int32(), "free": pa.int32(), "asked": pa.bool_()}
)


def words(text: str) -> list[str]:
    """The words of `text` in lower case, without punctuation, as a reason quotes them."""
    return WORD.findall(text.casefold())


def table_of(held: Sequence[Held]) -> pa.Table:
    return pa.table([list(c) for c in zip(*held, strict=True)] if held else [[]] * len(HELD), schema=HELD)


def once(texts: pa.Table) -> pa.Table:
    """The texts of one table's rows, without the questions that several rows ask ("Which of these is true?"): they
    count with an answer only. The other questions come last."""
    asked = texts.column("asked").to_numpy()
    if not asked.any():
        return texts
    numbers = np.flatnonzero(asked)
    said = [" ".join(words(text)) for text in texts.take(numbers).column("text").to_pylist()]
    times = Counter(said)
    return texts.take(
        np.append(np.flatnonzero(~asked), [n for n, s in zip(numbers, said, strict=True) if times[s] == 1])
    )


def held_texts(table: str, row: Row, whole: int, question: int, every: bool = False) -> Iterator[Held]:
    """What must not be trained on of a held-out row. With `every`, what users ask in dialogues is a question too, as in
    a set to test on."""
    name = row["id"]
    yield from (Held(name, text, whole, FREE) for text in _spoken(table, row))
    yield from (Held(name, text, ANSWERED, FREE) for text in _answered(table, row))
    yield from (Held(name, text, question, FREE_QUESTION, True) for text in _asked(table, row, every))


def train_texts(table: str, row: Row) -> Iterator[str]:
    """The texts of a row that is trained on."""
    yield from _spoken(table, row)
    yield from _answered(table, row)


def _spoken(table: str, row: Row) -> Iterator[str]:
    """Texts that stand for themselves: documents, the choices of a question, what a person asks."""
    if table == "corpus":
        yield row["text"]
    elif table == "eval":
        yield from row["choices"]
    elif table == "prompts":
        yield " ".join(m["content"] for m in row["messages"])


def _asked(table: str, row: Row, every: bool) -> Iterator[str]:
    if table == "eval":
        yield row["question"]
    elif every and table != "corpus":
        yield from (m["content"] for m in row["messages"] if m["role"] == "user")


def _answered(table: str, row: Row) -> Iterator[str]:
    """Questions followed by an answer; of a preference also by the rejected one, which is another question's answer."""
    if table == "eval":
        yield f"{row['question']} {row['choices'][row['answer']]}"
    elif table == "instructions":
        yield " ".join(_said(m) for m in row["messages"])
    elif table == "preferences":
        asked = " ".join(_said(m) for m in row["messages"])
        yield from (f"{asked} {_said(row[key])}" for key in ("chosen", "rejected") if row.get(key) is not None)


def _said(message: Row) -> str:
    """A message's words; of a call, its arguments."""
    arguments = [str(v) for c in message.get("tool_calls") or () for v in c["arguments"].values()]
    return " ".join([message["content"], *arguments])

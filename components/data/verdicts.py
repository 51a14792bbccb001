"""What is decided about the rows of a table by comparing them: on the facts that the first pass noted, some hundred
bytes a row, whatever the length of the text.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from components.data import neardup
from components.data.jsonlines import Shard
from components.data.shards import CONTENT, DIGEST, ID, OBJECT
from components.data.suites import FACTS

STAYS = {"test": 0, "val": 1, "train": 2}  # which of several copies is kept
# Reasons that no rule of a row gives: they do not speak against the data as a whole.
COPIES = ("duplicate", "near-duplicate")
LATER = (*COPIES, "contaminated", "poison", "language", "quality")


@dataclass
class Table:
    """A table's lines, numbered through all its shards. `left` are those that nothing speaks against so far."""

    name: str
    shards: list[Shard]
    first: np.ndarray  # [s + 1] the number of each shard's first line
    facts: pa.Table  # lies on disk
    keys: np.ndarray  # [3, n]
    good: np.ndarray  # [n] bool: breaks no rule
    left: np.ndarray  # [n] bool
    stays: np.ndarray  # [n] the place of its split in STAYS
    why: dict[int, str] = field(default_factory=dict)
    redacted: set[int] = field(default_factory=set)

    def reject(self, i: int, reason: str) -> None:
        self.left[i] = False
        self.why[int(i)] = reason

    def id(self, i: int) -> str:
        return str(self.facts.column("id")[int(i)].as_py())

    def place(self, i: int) -> tuple[str, int]:
        """The file and line of line number i."""
        k = int(np.searchsorted(self.first, i, "right")) - 1
        begin = next(j for j, s in enumerate(self.shards) if s.name == self.shards[k].name)
        return self.shards[k].name, int(i - self.first[begin]) + 1

    def by_shard(self, mask: np.ndarray) -> list[np.ndarray]:
        return [mask[a:b] for a, b in zip(self.first[:-1], self.first[1:], strict=True)]

    def held(self) -> np.ndarray:
        """Which rows must not be trained on."""
        return np.ones(len(self.left), bool) if self.name == "eval" else self.stays == STAYS["test"]

    def kept(self) -> pa.Table:
        return self.facts.filter(pa.array(self.left))

    def contents(self) -> np.ndarray:
        """A number for what each kept row says."""
        return np.unique(self.keys[CONTENT][self.left], return_inverse=True)[1]

    def broken(self) -> list[str | None]:
        """For each line the rule that it broke, with its place; None where it is kept or goes for what others hold."""
        return self._said(lambda kind: kind not in LATER)

    def copies(self) -> list[str | None]:
        """For each line that is a copy its place and what of; None for the others."""
        return self._said(lambda kind: kind in COPIES)

    def _said(self, of: Callable[[str], bool]) -> list[str | None]:
        found: list[str | None] = [None] * len(self.left)
        for i, reason in self.why.items():
            if of(reason.partition(":")[0]):
                file, line = self.place(i)
                found[i] = f"{file}:{line} {reason}"
        return found

    def in_order(self) -> np.ndarray:
        """The rows left: the test's, then val's, then train's, else as they were read."""
        left = np.flatnonzero(self.left)
        return left[np.argsort(self.stays[left], kind="stable")]

    def reject_used_ids(self) -> None:
        for i, other in _later(self.keys[ID], np.flatnonzero(self.left)):
            file, line = self.place(other)
            self.reject(i, f"id used twice: also at {file}:{line}")

    def reject_duplicates(self) -> None:
        for i, other in _later(self.keys[CONTENT], self.in_order()):
            self.reject(i, f"duplicate: of {self.id(other)}")

    def reject_unwanted(self) -> None:
        column = self.facts.column("unwanted")
        for i in np.flatnonzero(self.left & column.is_valid().to_numpy()).tolist():
            self.reject(i, column[i].as_py())

    def reject_near_duplicates(self, threshold: float) -> None:
        """Of rows that are nearly copies the first one stays."""
        order = self.in_order()
        if not len(order):
            return
        at = (np.cumsum(self.good) - 1)[order]  # signatures are of good rows alone
        label = neardup.first_of([s.work for s in self.shards], at, threshold)
        for k in np.flatnonzero(label != np.arange(len(label))):
            self.reject(order[k], f"near-duplicate: of {self.id(order[label[k]])}")


def load(name: str, shards: list[Shard]) -> Table:
    """What the first pass noted of a table."""
    mapped = [pa.memory_map(str(s.work / "facts.arrow")) for s in shards]
    parts = [pa.ipc.open_file(m).read_all() for m in mapped]
    first = np.cumsum([0] + [len(p) for p in parts])
    facts = pa.concat_tables(parts).unify_dictionaries() if parts else FACTS.empty_table()
    keys = [np.load(s.work / "keys.npy") for s in shards]
    good = facts.column("broken").is_null().to_numpy()
    table = Table(
        name,
        shards,
        first,
        facts,
        np.concatenate(keys, axis=1) if keys else np.empty((3, 0), DIGEST),
        good,
        good.copy(),
        _stays(facts),
    )
    for i in np.flatnonzero(~good).tolist():
        table.why[i] = facts.column("broken")[i].as_py()
    return table


def _stays(facts: pa.Table) -> np.ndarray:
    column = facts.column("split").combine_chunks()
    codes = column.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return np.array([*(STAYS[s] for s in column.dictionary.to_pylist()), len(STAYS)], np.int8)[codes]


def _later(keys: np.ndarray, order: np.ndarray) -> Iterator[tuple[int, int]]:
    """Rows whose key an earlier row of the order has, with the first such row."""
    _, at, back = np.unique(keys[order], return_index=True, return_inverse=True)
    first = order[at][back]
    for k in np.flatnonzero(first != order).tolist():
        yield int(order[k]), int(first[k])


def splits_of_objects(tables: Sequence[Table]) -> Iterator[tuple[Table, np.ndarray]]:
    """For each table, in how many splits of all tables the object of each kept row stands."""
    _, codes = np.unique(np.concatenate([t.keys[OBJECT][t.left] for t in tables]), return_inverse=True)
    seen = np.zeros((int(codes.max(initial=-1)) + 1, len(STAYS)), bool)
    seen[codes, np.concatenate([t.stays[t.left] for t in tables])] = True
    splits = seen.sum(1)[codes]
    ends = np.cumsum([t.left.sum() for t in tables])
    yield from zip(tables, np.split(splits, ends[:-1]), strict=True)


def category(reason: str) -> str:
    """The kind that a reason is counted as: what stands before the colon, and of quality the filter too."""
    kind, _, rest = reason.partition(":")
    return f"{kind}:{rest.partition(':')[0]}" if kind == "quality" else kind

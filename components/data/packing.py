"""Best-fit packing: documents fill windows whole wherever they fit, instead of being cut where a window happens to end.

Only a document longer than the context is cut. The pieces go, longest first, each into the window in which it leaves
the least room ("Fewer Truncations Improve Language Modeling", Ding et al. 2024). Lengths are small whole numbers, so
windows are kept by the room that is left in them, and all pieces of one length are placed at once: a million documents
take a second or two.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from components.artifact import ForjaError
from components.data.batches import kept_order


class Plan(NamedTuple):
    """Which pieces of the shard make which window: window i has the pieces first[i] to first[i + 1].

    A piece is a run of tokens to predict, each from the ones before it in its piece and the one before that: the first
    token of a document is predicted from the separator, as when the model is asked.
    """

    shard: Path
    context: int
    first: np.ndarray  # int64 [windows + 1]
    start: np.ndarray  # int64 [pieces], places in the shard
    length: np.ndarray  # int64 [pieces]

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def waste(self) -> float:
        """The share of the windows' places that hold nothing."""
        return 1 - int(self.length.sum()) / (len(self) * self.context)


class Window(NamedTuple):
    """Tokens, the tokens to predict from them (-1: none), and the lengths of the pieces from left to right, of which
    a last one that holds nothing fills the window up."""

    ids: np.ndarray  # int64 [context]
    targets: np.ndarray  # int64 [context]
    lengths: list[int]


def pack(shard: Path, context: int) -> Plan:
    """The plan of a shard <split>.npy, whose documents end where <split>.ends.npy says."""
    path = shard.with_suffix(".ends.npy")
    if not path.is_file():
        raise ForjaError(f"{path}: missing, and packing by documents needs it; run the tokenize stage again")
    start, length = pieces(np.load(path), context)
    window, windows = best_fit(length, context)
    by_window = np.argsort(window, kind="stable")
    first = np.concatenate(([0], np.cumsum(np.bincount(window, minlength=windows))))
    return Plan(shard, context, first, start[by_window], length[by_window])


def pieces(ends: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the pieces of documents begin, and their lengths: `context` tokens, and what is left of each document."""
    starts = np.concatenate(([0], ends[:-1]))
    counts = -(-(ends - starts) // context)
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    start = np.repeat(starts, counts) + nth * context
    return start, np.minimum(np.repeat(ends, counts) - start, context)


def best_fit(lengths: np.ndarray, room: int) -> tuple[np.ndarray, int]:
    """The bin of each item (best-fit decreasing), and the number of bins of size `room`. No length is above it."""
    bins = np.empty(len(lengths), dtype=np.int64)
    longest_first = np.argsort(-lengths, kind="stable")
    bounds = np.flatnonzero(np.diff(lengths[longest_first], prepend=-1, append=-1))
    left: list[list[np.ndarray]] = [[] for _ in range(room + 1)]  # open bins by the room that is left in them
    some = 0  # the bits r for which left[r] is not empty
    used = 0
    for alike, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        begin, length = alike, int(lengths[longest_first[alike]])
        while begin < end:
            fitting = some >> length
            space = length + (fitting & -fitting).bit_length() - 1 if fitting else room
            each = space // length  # items that one of these bins takes before another fits better
            wanted = -(-(end - begin) // each)
            if fitting:
                taken = left[space].pop()
                if len(taken) > wanted:
                    left[space].append(taken[wanted:])
                    taken = taken[:wanted]
                if not left[space]:
                    some &= ~(1 << space)
            else:
                taken = np.arange(used, used + wanted)
                used += wanted
            items = longest_first[begin : min(end, begin + len(taken) * each)]
            bins[items] = np.repeat(taken, each)[: len(items)]
            begin += len(items)
            short = len(taken) * each - len(items)  # by so many items the last bin is not full
            full = taken[:-1] if short else taken
            for group, rest in ((full, space - each * length), (taken[len(full) :], space - (each - short) * length)):
                if len(group) and rest:
                    left[rest].append(group)
                    some |= 1 << rest
    return bins, used


def packed(plan: Plan, seed: int, step: int, batch: int) -> list[Window]:
    """Batch `step` of the plan's windows, each epoch in an order of its own."""
    tokens = np.load(plan.shard, mmap_mode="r")
    out = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, at = divmod(position, len(plan))
        out.append(window(plan, tokens, int(kept_order(seed, epoch, len(plan))[at])))
    return out


def window(plan: Plan, tokens: np.ndarray, i: int) -> Window:
    """Window i. Before the shard's first token stands what stands before every other document: the separator, which
    is the shard's last."""
    ids = np.full(plan.context, int(tokens[-1]), dtype=np.int64)
    targets = np.full(plan.context, -1, dtype=np.int64)
    lengths, at = [], 0
    for piece in range(int(plan.first[i]), int(plan.first[i + 1])):
        start, length = int(plan.start[piece]), int(plan.length[piece])
        targets[at : at + length] = tokens[start : start + length]
        ids[at + (start == 0) : at + length] = tokens[max(0, start - 1) : start + length - 1]
        lengths.append(length)
        at += length
    return Window(ids, targets, [*lengths, plan.context - at] if at < plan.context else lengths)


def truncated(ends: np.ndarray, context: int) -> tuple[float, float]:
    """The share of documents that are cut: by best fit, and by concatenating all and cutting at every window's end."""
    starts = np.concatenate(([0], ends[:-1]))
    return float((ends - starts > context).mean()), float((starts // context != (ends - 1) // context).mean())

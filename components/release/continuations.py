"""The log-probability of texts behind texts: the choices of a question, the last word of a passage.

What several requests begin with is read once. The choices of one question stand side by side in a row, behind the
question, and do not see each other; and what many questions begin with, such as the same examples before each, is read
alone, and its keys and values serve all of them.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from components.model.gpt import GPT, KVCache
from components.model.reader import Reader, reader

BATCH = 1024  # tokens of a batch and core, padding included: what its layers say stays in the cores' caches
LOGITS = 1 << 23  # numbers that the head says at once
WORTH = 256  # tokens that a pass of its own for a common beginning has to save
NOTHING = -(1 << 30)  # the part of a row that pads it
Request = tuple[Sequence[int], Sequence[int]]  # (context, continuation)


class Score(NamedTuple):
    logprob: float  # of the whole continuation, in nats
    greedy: bool  # whether each of its tokens is the likeliest


class Item(NamedTuple):
    """A context, and the continuations that were asked for behind it, each with the requests that ask."""

    context: tuple[int, ...]
    choices: dict[tuple[int, ...], list[int]]

    def length(self, smear: bool) -> int:
        """Tokens of its row: a continuation's last one is only predicted."""
        return len(self.context) + sum(len(c) - 1 + (smear and len(c) > 1) for c in self.choices)


@torch.no_grad()
def scores(
    model: GPT | Reader, requests: Sequence[Request], done: Callable[[int], None] = lambda n: None
) -> list[Score]:
    """One score a request, in their order. `done` is told how many more requests are.

    A context that does not fit loses tokens at its beginning. Raises ValueError for an empty context or continuation,
    and for a continuation that does not fit.
    """
    model = model if isinstance(model, Reader) else reader(model)
    out: list[Score | None] = [None] * len(requests)
    smear = model.config.smear
    for shared, items in groups(gathered(requests, model.config.context)):
        before = _read(model, items[0].context[:shared]) if shared else None
        for batch in _batches(items, shared, smear):
            told = 0
            for item, found in zip(batch, _score(model, batch, shared, before), strict=True):
                for score, wanted in zip(found, item.choices.values(), strict=True):
                    for i in wanted:
                        out[i] = score
                    told += len(wanted)
            done(told)
    return [score for score in out if score is not None]


def gathered(requests: Sequence[Request], limit: int) -> list[Item]:
    """The requests by their contexts, cut from the left to what a model of `limit` positions can read."""
    found: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for i, (context, continuation) in enumerate(requests):
        n = len(continuation)
        if not context or not n:
            raise ValueError("a context and its continuation need a token each")
        if n > limit:
            raise ValueError(f"a continuation of {n} tokens does not fit the model's context of {limit}")
        room = limit + 1 - n  # the last token is only predicted
        found.setdefault(tuple(context[-room:]), {}).setdefault(tuple(continuation), []).append(i)
    return [Item(context, choices) for context, choices in found.items()]


def groups(items: list[Item]) -> Iterator[tuple[int, list[Item]]]:
    """(tokens that all of them begin with, items): the partition of the items, sorted, that has the fewest tokens.

    At least one token of each context is left, behind which its continuations stand. Those that share nothing worth a
    pass of its own come last, together, with 0.
    """
    items = sorted(items, key=lambda item: item.context)
    common = [_common(a.context, b.context) for a, b in itertools.pairwise(items)]
    alone: list[Item] = []
    spans = [(0, len(items))]
    while spans:
        start, stop = spans.pop()
        inner = common[start : stop - 1]
        if not inner:
            alone += items[start:stop]
            continue
        shared = min(inner)
        cuts = [start, *(start + i + 1 for i, n in enumerate(inner) if n == shared), stop]
        parts = list(itertools.pairwise(cuts))
        split = sum(_saved(common[a : b - 1]) for a, b in parts)
        if shared * len(inner) >= max(WORTH, split):
            yield shared, items[start:stop]
        else:
            spans += parts
    if alone:
        yield 0, alone


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Tokens that both begin with, and that leave one of each."""
    most = min(len(a), len(b)) - 1
    return next((i for i in range(most) if a[i] != b[i]), most)


def _saved(common: list[int]) -> int:
    """Tokens that neighbours with these beginnings in common save if they are read together."""
    return min(common, default=0) * len(common)


def _batches(items: list[Item], shared: int, smear: bool) -> Iterator[list[Item]]:
    """Longest first, so that what memory it takes shows at once."""
    batch: list[Item] = []
    longest, most = 0, BATCH * torch.get_num_threads()
    for item in sorted(items, key=lambda item: item.length(smear), reverse=True):
        if batch and (longest - shared) * (len(batch) + 1) > most:
            yield batch
            batch = []
        longest = longest if batch else item.length(smear)
        batch.append(item)
    yield batch


def _read(model: GPT | Reader, tokens: Sequence[int]) -> KVCache:
    """The keys and values of what many contexts begin with."""
    device = _device(model)
    cache = KVCache(model.config, 1, len(tokens), torch.empty(0, device=device))
    model.hidden(torch.tensor([tokens], device=device), cache=cache)
    return cache


def _device(model: GPT | Reader) -> torch.device:
    return model.device if isinstance(model, Reader) else model.wte.weight.device


class _Behind(KVCache):
    """What stands before every row, for each alike; what the rows themselves say is not kept."""

    def __init__(self, before: KVCache, rows: int) -> None:
        self.k, self.v, self.filled = before.k, before.v, before.filled
        self.last = None if before.last is None else before.last.expand(rows, 1)

    def append(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        before = (x[layer].expand(len(k), -1, -1, -1) for x in (self.k, self.v))
        return tuple(torch.cat(both, dim=2) for both in zip(before, (k, v), strict=True))  # type: ignore[return-value]


class Row(NamedTuple):
    """One item's tokens side by side. Numbers are places in the row."""

    ids: list[int]
    positions: list[int]
    parts: list[int]  # 0: the context; k: the k-th continuation; minus k: what its first token stands behind
    asked: list[tuple[list[int], list[int]]]  # of each continuation: the places that predict, and its tokens


def _row(item: Item, shared: int, smear: bool) -> Row:
    """A model with smear looks at the token before, so there the context's last one is repeated before each
    continuation; nothing looks at it there."""
    ids = list(item.context[shared:])
    size, asked = len(ids), []
    positions, parts = list(range(shared, shared + size)), [0] * size
    for k, choice in enumerate(item.choices, 1):
        n = len(choice) - 1
        if smear and n:
            ids.append(item.context[-1])
            positions.append(shared + size - 1)
            parts.append(-k)
        asked.append(([size - 1, *range(len(ids), len(ids) + n)], list(choice)))
        ids += choice[:n]
        positions += range(shared + size, shared + size + n)
        parts += [k] * n
    return Row(ids, positions, parts, asked)


def _score(model: GPT | Reader, batch: list[Item], shared: int, before: KVCache | None) -> list[list[Score]]:
    device = _device(model)
    rows = [_row(item, shared, model.config.smear) for item in batch]
    longest = max(len(row.ids) for row in rows)
    padded = lambda rows, pad: torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])  # noqa: E731
    ids, positions, parts = map(padded, zip(*(row[:3] for row in rows), strict=True), (0, 0, NOTHING))
    plain = before is None and not any(map(any, (row.parts for row in rows)))
    hidden = model.hidden(
        ids.to(device),
        positions=None if plain else positions.to(device),
        mask=None if plain else _mask(positions, parts, shared, model.config.window).to(device),
        cache=None if before is None else _Behind(before, len(rows)),
    )
    places = [
        (i * longest + at, token)
        for i, row in enumerate(rows)
        for p, t in row.asked
        for at, token in zip(p, t, strict=True)
    ]
    at, targets = torch.tensor(places, device=device).T
    where, which = at.unique(return_inverse=True)
    states = hidden.flatten(0, 1)[where]
    logprob, likeliest = torch.empty(len(at)), torch.empty(len(at), dtype=torch.bool)
    size = max(1, LOGITS // model.config.vocab_size)
    for first in range(0, len(where), size):
        logits = model.logits(states[first : first + size])
        mine = ((which >= first) & (which < first + size)).nonzero().squeeze(1)
        row, target = which[mine] - first, targets[mine]
        logprob[mine.cpu()] = (logits[row, target] - logits.logsumexp(-1)[row]).cpu()
        likeliest[mine.cpu()] = (logits.argmax(-1)[row] == target).cpu()
    sizes = torch.tensor([len(tokens) for row in rows for _, tokens in row.asked])
    of = torch.arange(len(sizes)).repeat_interleave(sizes)
    total = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, of, logprob.double()).tolist()
    right = (torch.zeros(len(sizes), dtype=torch.long).index_add_(0, of, likeliest.long()) == sizes).tolist()
    found = itertools.starmap(Score, zip(total, right, strict=True))
    return [[next(found) for _ in row.asked] for row in rows]


def _mask(positions: Tensor, parts: Tensor, shared: int, window: int | None) -> Tensor:
    """What each place may see, [B, 1, T, shared + T], as what is added to a score: itself, and what is before it in the
    context and in its own continuation."""
    at, part = positions[:, :, None], parts.abs()[:, :, None]
    mine = parts[:, None, :]
    seen = (positions[:, None, :] <= at) & ((mine == 0) | (mine == part))
    seen |= torch.eye(seen.shape[1], dtype=torch.bool)
    first = torch.arange(shared).expand(*seen.shape[:2], shared)
    seen = torch.cat((torch.ones_like(first, dtype=torch.bool), seen), dim=2)
    if window is not None:
        keys = torch.cat((first, positions[:, None, :].expand_as(seen[:, :, shared:])), dim=2)
        seen &= keys > at - window
    return torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)[:, None]

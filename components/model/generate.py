"""Text from a model: batched, streamed, with a key-value cache, the same for a request alone or among others."""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple, Required, TypedDict, Unpack

import torch
from torch import Tensor

from components.model.decode import BLOCK, Decoder, Graph
from components.model.gpt import GPT, KVCache
from components.model.losses import pad_right
from components.model.parallel import divided
from components.model.sampling import Sampling, chosen, logprobs, uniform
from components.model.spoken import Decode, Spoken


class Options(TypedDict, total=False):
    """How to continue. Request i is the same text for the same prompt, options and seed, whatever stands beside it."""

    max_new_tokens: Required[int]
    stop: Required[int | Collection[int]]  # tokens that end an answer; the one that did is its last
    stop_strings: Sequence[str]  # texts that end an answer; they need `decode`
    decode: Decode | None  # tokens to text
    temperature: float  # 0: the likeliest token
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float  # over prompt and answer
    seed: int  # request i draws from the stream of (seed, i) ...
    seeds: Sequence[int] | None  # ... or from that of seeds[i], wherever it stands
    logprobs: bool
    dtype: torch.dtype | None  # of weights and cache; None: the model's own
    alone: bool  # one request is as fast as can be, and may differ by rounding from the same in a batch
    graph: bool  # on a GPU: record a step once and replay it


class Token(NamedTuple):
    """One step of one request."""

    request: int
    id: int
    logprob: float | None  # log p of the model at temperature 1, before any penalty or filter
    text: str  # what can now be shown; "" without `decode`
    end: str | None  # "stop", "length", or None while it goes on


class Answer(NamedTuple):
    ids: list[int]  # the new tokens; with a stop string, up to the one that completes it
    logprobs: list[float]  # one a token, where they were asked for
    text: str  # without the stop string; "" without `decode`
    end: str  # "stop" or "length"


def generate(model: GPT | Decoder, prompts: Sequence[Sequence[int]], **options: Unpack[Options]) -> list[list[int]]:
    """The new tokens of each prompt's continuation."""
    return [a.ids for a in answers(model, prompts, **options)]


def answers(model: GPT | Decoder, prompts: Sequence[Sequence[int]], **options: Unpack[Options]) -> list[Answer]:
    """Each prompt's continuation with all that is known of it."""
    tokens: list[list[Token]] = [[] for _ in prompts]
    for token in stream(model, prompts, **options):
        tokens[token.request].append(token)
    return [
        Answer(
            [t.id for t in row],
            [t.logprob for t in row if t.logprob is not None],
            "".join(t.text for t in row),
            (row[-1].end if row else None) or "length",
        )
        for row in tokens
    ]


@torch.no_grad()
def stream(model: GPT | Decoder, prompts: Sequence[Sequence[int]], **options: Unpack[Options]) -> Iterator[Token]:
    """Continue each prompt until a stop, `max_new_tokens` or the end of the context: one Token a step and request.

    A prompt that leaves no room for an answer keeps its last tokens. Raises ValueError for an empty prompt, and for
    an option that means nothing.
    """
    if not prompts:
        return
    if min(map(len, prompts)) == 0:
        raise ValueError("an empty prompt has no last token to continue from")
    how = Sampling(**{k: v for k, v in options.items() if k in Sampling._fields})  # type: ignore[arg-type]
    how.check()
    stop = options["stop"]
    stops = {stop} if isinstance(stop, int) else set(stop)
    if options["max_new_tokens"] < 0:
        raise ValueError(f"max_new_tokens must be at least 0: {options['max_new_tokens']}")
    new = min(options["max_new_tokens"], model.config.context - 1)
    kept = [list(p)[-(model.config.context - new) :] for p in prompts]
    decode, stop_strings = options.get("decode"), options.get("stop_strings", ())
    if stop_strings and decode is None:
        raise ValueError("stop strings need `decode`")
    spoken = [Spoken(decode, stop_strings) for _ in prompts] if decode else []

    reader = _reader(model, options, len(prompts))
    device = reader.device if isinstance(reader, Decoder) else reader.wte.weight.device
    batch = Batch(reader, kept, new, _noise(options, len(prompts), new, device), how)
    batch.graphed = options.get("graph", False) and device.type == "cuda" and isinstance(reader, Decoder)
    for step in range(new):
        tokens = chosen(batch.logits, batch.noise[:, step], batch.seen, how)
        known = logprobs(batch.logits, tokens).tolist() if options.get("logprobs") else None
        going: list[bool] = []
        for row, id in enumerate(tokens.tolist()):
            request = batch.requests[row]
            if batch.over[row]:
                going.append(False)
                continue
            text = spoken[request].add(id) if spoken and id not in stops else ""
            end = "stop" if id in stops or (spoken and spoken[request].stopped) else None
            end = end or ("length" if step + 1 == new else None)
            if end and spoken:
                text += spoken[request].end()
            going.append(end is None)
            yield Token(request, id, None if known is None else known[row], text, end)
        if not any(going):
            return
        batch.step(tokens, going)


class Batch:
    """The requests that go on: their cache, their lengths, and the logits of their next tokens."""

    def __init__(self, reader: GPT | Decoder, prompts: list[list[int]], new: int, noise: Tensor, how: Sampling) -> None:
        self.reader = reader
        device = noise.device
        self.requests = list(range(len(prompts)))
        self.over = [False] * len(prompts)
        self.noise = noise
        self.graphed = False
        self.graph: Graph | None = None
        self.lengths = torch.tensor([len(p) for p in prompts], device=device)
        self.ragged = bool((self.lengths != self.lengths[0]).any())
        ids = pad_right(prompts, 0, device)
        if isinstance(reader, Decoder):  # few queries would take another kernel, which rounds otherwise
            whole = min(-(-ids.shape[1] // BLOCK) * BLOCK, reader.config.context)
            ids = torch.nn.functional.pad(ids, (0, whole - ids.shape[1]))
        self.cache = _cache(reader, len(prompts), ids.shape[1] + new)
        self.logits = self._read(ids)
        self.seen: Tensor | None = None
        if how.repetition_penalty != 1:
            real = torch.arange(ids.shape[1], device=device) < self.lengths[:, None]
            counts = torch.zeros(self.logits.shape, device=device)
            self.seen = counts.scatter_add_(1, ids, real.float()) > 0

    def _read(self, ids: Tensor) -> Tensor:
        """The logits behind each prompt. What is padded behind it is seen by nothing before it, and overwritten."""
        B, T = ids.shape
        last, rows = self.lengths - 1, torch.arange(B, device=ids.device)
        size = self.reader.chunk(B, T) if isinstance(self.reader, Decoder) else T
        ends = torch.empty(0)
        for start in range(0, T, size):
            hidden = self.reader.hidden(ids[:, start : start + size], cache=self.cache)
            found = hidden[rows, (last - start).clamp(0, hidden.shape[1] - 1)]
            ends = torch.where((last >= start)[:, None], found, ends) if start else found
        self.cache.last = ids[rows, last, None]
        self.cache.filled = int(last.max()) + 1
        return self.reader.logits(ends)

    def step(self, tokens: Tensor, going: list[bool]) -> None:
        """Read one more token a row. Finished rows leave once a quarter are done: a copy of the cache is not free."""
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        self.over = [not g for g in going]
        if 4 * sum(self.over) >= len(going):
            rows = torch.tensor([i for i, g in enumerate(going) if g], device=tokens.device)
            self.cache.keep(rows)
            tokens, self.noise, self.lengths = tokens[rows], self.noise[rows], self.lengths[rows]
            self.seen = None if self.seen is None else self.seen[rows]
            self.requests = [r for r, g in zip(self.requests, going, strict=True) if g]
            self.over, self.graph = [False] * len(rows), None
        ids, positions = tokens[:, None], self.lengths[:, None]
        if self.graphed and isinstance(self.reader, Decoder):
            self.graph = self.graph or Graph(self.reader, self.cache, ids, positions)
            self.logits = self.graph(ids, positions)
        else:
            hidden = self.reader.hidden(ids, positions=positions if self.ragged else None, cache=self.cache)
            self.logits = self.reader.logits(hidden[:, -1])
        self.lengths = self.lengths + 1


def _reader(model: GPT | Decoder, options: Options, requests: int) -> GPT | Decoder:
    """What reads the tokens: a Decoder of the model as it now is, or a model that is spread over devices itself."""
    if isinstance(model, Decoder):
        return model
    if divided(model):
        return model
    return Decoder(model, options.get("dtype"), requests == 1 and options.get("alone", False))


def _cache(reader: GPT | Decoder, batch: int, length: int) -> KVCache:
    if isinstance(reader, Decoder):
        return reader.cache(batch, length)
    return KVCache(reader.config, batch, length, reader.wte.weight)


def _noise(options: Options, requests: int, new: int, device: torch.device) -> Tensor:
    """Each request's own random numbers [requests, new]."""
    seeds = options.get("seeds")
    if seeds is None:
        seeds = [options.get("seed", 0) * 1_000_003 + i for i in range(requests)]
    if len(seeds) != requests:
        raise ValueError(f"{len(seeds)} seeds for {requests} requests")
    return torch.stack([uniform(seed, new) for seed in seeds]).to(device)

"""Text from a model: batched, with a static key-value cache, the same for a request alone or among others."""

from collections.abc import Sequence

import torch
from torch import Tensor

from components.model.gpt import GPT, KVCache
from components.model.losses import pad_right


@torch.no_grad()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """Continue each prompt until `stop`, `max_new_tokens` or the end of the context; only new tokens are returned.

    Temperature 0 takes the likeliest token. Request i draws from its own stream, seeded by (seed, i). A prompt that
    leaves no room for an answer keeps its last tokens. Raises ValueError for an empty prompt.
    """
    if not prompts:
        return []
    if min(map(len, prompts)) == 0:
        raise ValueError("an empty prompt has no last token to continue from")
    device = model.wte.weight.device
    new = min(max_new_tokens, model.config.context - 1)
    kept = [list(p)[-(model.config.context - new) :] for p in prompts]
    longest = max(map(len, kept))
    lengths = torch.tensor([len(p) for p in kept], device=device)
    ids = pad_right(kept, stop, device)
    noise = torch.stack([_uniform(seed, i, new) for i in range(len(prompts))]).to(device)

    cache = KVCache(model.config, len(prompts), longest + new, model.wte.weight)
    rows = torch.arange(len(prompts), device=device)
    hidden = model.hidden(ids, cache=cache)[rows, lengths - 1]  # what is padded behind is seen by nothing before it
    cache.last = ids[rows, lengths - 1, None]
    logits = model.logits(hidden)

    out: list[list[int]] = [[] for _ in prompts]
    alive = torch.arange(len(prompts), device=device)
    going = torch.ones(len(prompts), dtype=torch.bool, device=device)
    for step in range(new):
        token = _pick(logits, noise[alive, step], temperature, top_k, top_p)
        for row, value in zip(alive.tolist(), token.tolist(), strict=True):
            out[row].append(value)
        going = going & (token != stop)
        if step + 1 == new or not going.any():
            break
        if going.sum() <= len(alive) // 2:  # finished rows leave once half are done: a copy of the cache is not free
            rows = going.nonzero().squeeze(1)
            cache.keep(rows)
            alive, token, going = alive[rows], token[rows], going[rows]
        logits = model(token[:, None], positions=(lengths[alive] + step)[:, None], cache=cache)[:, -1]
    return [_cut(tokens, stop) for tokens in out]


def _uniform(seed: int, request: int, n: int) -> Tensor:
    """The request's own stream of `n` numbers in [0, 1): no other request moves it."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + request) % (1 << 63))
    return torch.rand(n, generator=generator)


def _pick(logits: Tensor, noise: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """One token [B] a row of logits [B, V]: the likeliest, or the one where the cumulated probability passes noise."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits / temperature, dim=-1)
    if top_k or top_p < 1:
        ranked, order = probs.sort(dim=-1, descending=True, stable=True)
        if top_k:
            ranked[:, top_k:] = 0
        if top_p < 1:
            ranked[ranked.cumsum(-1) - ranked >= top_p] = 0  # the token that crosses top_p stays
        probs = torch.zeros_like(probs).scatter(1, order, ranked)
    total = probs.cumsum(-1)
    drawn = torch.searchsorted(total, (noise[:, None] * total[:, -1:]), right=True).squeeze(1)
    return drawn.clamp(max=logits.shape[1] - 1)


def _cut(tokens: list[int], stop: int) -> list[int]:
    return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens

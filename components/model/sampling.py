"""How a token is chosen from logits [N, vocab]: free functions, each the usual definition of its name."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

COLDEST = 1e-6  # below it logits over temperature leave float32; greedy is temperature 0


class Sampling(NamedTuple):
    """What is done to the logits, in this order; the defaults leave them as they are, and temperature 0 is greedy."""

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0

    def check(self) -> None:
        """Raises ValueError for a setting that means nothing."""
        if not 0 < self.repetition_penalty < math.inf or self.top_k < 0:
            raise ValueError(f"repetition_penalty must be above 0 and finite, top_k at least 0: {self}")
        if self.temperature != 0 and not COLDEST <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0, or at least {COLDEST} and finite: {self}")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, min_p between 0 and 1: {self}")


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Positive logits of the tokens that `seen` [N, vocab] marks are divided by the penalty, negative ones multiplied
    (Keskar et al. 2019, CTRL, as everyone has implemented it since)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k likeliest tokens, and what ties with the last of them; the others get -inf."""
    least = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The fewest likeliest tokens whose probabilities sum to p or more (Holtzman et al. 2020); the others get -inf."""
    ranked, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    out = ranked.cumsum(-1) - ranked >= p  # the token that crosses p stays
    out[:, 0] = False
    return logits.masked_fill(torch.zeros_like(out).scatter(1, order, out), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """The tokens at least p times as likely as the likeliest (Nguyen et al. 2024); the others get -inf."""
    probs = logits.softmax(-1)
    return logits.masked_fill(probs < p * probs.amax(-1, keepdim=True), -torch.inf)


def filtered(logits: Tensor, how: Sampling) -> Tensor:
    """Temperature (above 0), top-k, top-p and min-p, in this order; each measures what the ones before it have left."""
    logits = logits / how.temperature
    if how.top_k:
        logits = keep_top_k(logits, how.top_k)
    if how.top_p < 1:
        logits = keep_top_p(logits, how.top_p)
    if how.min_p > 0:
        logits = keep_min_p(logits, how.min_p)
    return logits


def drawn(logits: Tensor, noise: Tensor) -> Tensor:
    """The token [N] of each row at which the cumulated probability passes its `noise` [N], uniform in [0, 1)."""
    total = logits.softmax(-1).cumsum(-1)
    return (
        torch.searchsorted(total, noise[:, None] * total[:, -1:], right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)
    )


def uniform(seed: int, n: int) -> Tensor:
    """A request's own stream of `n` numbers in [0, 1): no other request moves it."""
    return torch.rand(n, generator=torch.Generator().manual_seed(seed % (1 << 63)))


def chosen(logits: Tensor, noise: Tensor, seen: Tensor | None, how: Sampling) -> Tensor:
    """One token a row [N]: the likeliest, or drawn by `noise`. `seen` is wanted where there is a penalty."""
    if seen is not None:
        logits = penalised(logits, seen, how.repetition_penalty)
    return logits.argmax(-1) if how.temperature == 0 else drawn(filtered(logits, how), noise)


def logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p [N] of one token a row, at temperature 1, before any penalty or filter."""
    return logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)

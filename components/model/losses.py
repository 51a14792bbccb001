"""What is measured of a model's predictions, as free functions on tensors."""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from components.model.gpt import GPT

LOGITS = 1 << 25  # numbers that are held at once where only one of a row is wanted


def pad_right(sequences: Sequence[Sequence[int]], pad: int, device: torch.device | str = "cpu") -> Tensor:
    """Sequences of several lengths as one LongTensor [N, longest], filled with `pad` behind."""
    longest = max(map(len, sequences))
    rows = [[*s, *([pad] * (longest - len(s)))] for s in sequences]
    return torch.tensor(rows, dtype=torch.long, device=device)


def by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of about equal length, each of at most `batch_tokens` padded tokens (or one sequence)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and lengths[i] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def picked_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log p of `targets` [...] under `logits` [..., V]; several times faster than cross_entropy on the CPU."""
    return logits.gather(-1, targets[..., None]).squeeze(-1) - logits.logsumexp(-1)


@torch.no_grad()
def token_logprobs(model: GPT, sequences: Sequence[Sequence[int]], pad: int, batch_tokens: int = 8192) -> list[Tensor]:
    """log p of the tokens 1..n-1 of each sequence, float32 on the CPU, in the order given."""
    device = model.wte.weight.device
    out: list[Tensor] = [torch.empty(0)] * len(sequences)
    for batch in by_length([len(s) for s in sequences], batch_tokens):
        ids = pad_right([sequences[i] for i in batch], pad, device)
        hidden, targets = model.hidden(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        rows = max(1, LOGITS // model.config.vocab_size)
        parts = zip(hidden.split(rows), targets.split(rows), strict=True)
        logprobs = torch.cat([picked_logprobs(model.logits(h), t) for h, t in parts]).view(len(batch), -1).cpu()
        for row, i in enumerate(batch):
            out[i] = logprobs[row, : len(sequences[i]) - 1].clone()
    return out


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """A text's total negative log-likelihood in nats, as bits per UTF-8 byte."""
    return nats / math.log(2) / n_bytes


def windows(n: int, context: int) -> list[tuple[int, int, int]]:
    """Cut n tokens into windows (start, end, first) that score the tokens first..end-1.

    Each of the tokens 1..n-1 is scored once, and from the second window on with at least half a context before it.
    """
    half = context // 2
    found, first = [], 1
    while first < n:
        start = max(0, first - half) if first > 1 else 0
        end = min(n, start + context)
        found.append((start, end, first))
        first = end
    return found


def text_logprobs(model: GPT, tokens: Sequence[int], pad: int, context: int | None = None) -> Tensor:
    """log p of the tokens 1..n-1 of a text of any length, each once, by windows of `context` (default: the model's)."""
    cut = windows(len(tokens), context or model.config.context)
    logprobs = token_logprobs(model, [tokens[start:end] for start, end, _ in cut], pad)
    # logprobs[i][j] belongs to the window's token j + 1.
    parts = [lp[first - start - 1 :] for lp, (start, _, first) in zip(logprobs, cut, strict=True)]
    return torch.cat([torch.empty(0), *parts])


def text_bits_per_byte(model: GPT, documents: Sequence[int], n_bytes: int, separator: int) -> float:
    """Bits per byte of packed documents (tokens, `separator` behind each document) that are `n_bytes` long as text.

    The separators are paid for: the model must say where a document ends as a compressor of the text must.
    """
    nats = -text_logprobs(model, [separator, *documents], separator).double().sum().item()
    return bits_per_byte(nats, n_bytes)


def preference_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """Bradley-Terry: -log sigmoid(chosen - rejected - margin), elementwise (Ouyang et al. 2022, eq. 1; the margin, by
    which the better answer should lead, as in Touvron et al. 2023, eq. 2)."""
    return -F.logsigmoid(chosen - rejected - margin)

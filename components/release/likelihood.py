"""What a model's probabilities say: bits per byte of a text, the likeliest of four choices, the drift from a reference.

All sums are taken in float64 over float32 log-probabilities.
"""

import lzma
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from components.data.chat import SEPARATOR, encode, special
from components.model.checkpoint import Checkpoint
from components.model.gpt import GPT
from components.model.losses import bits_per_byte, token_logprobs


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


def xz_bits_per_byte(text: bytes) -> float:
    """What `xz -9` makes of the text, headers included."""
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


def choice_scores(checkpoint: Checkpoint, rows: Sequence[dict[str, Any]], prompts: dict[str, Any]) -> list[list[float]]:
    """For each row its choices' log-likelihoods in nats per UTF-8 byte of the choice, given the question as a prompt.

    Per byte, so that neither a short choice nor a tokenizer is favoured; what ends it is not counted. Dialogues longer
    than the context lose tokens at their beginning.
    """
    model, tokenizer, _ = checkpoint
    sequences, counted, sizes = [], [], []
    for row in rows:
        question = {"role": "user", "content": row["question"]}
        for choice in row["choices"]:
            answer = {"role": "assistant", "content": choice}
            ids, said = encode(tokenizer, [question, answer], prompts[row["lang"]])
            end = max(i for i, by_assistant in enumerate(said) if by_assistant)
            ids, said = ids[:end][-model.config.context :], said[:end][-model.config.context :]
            sequences.append(ids)
            counted.append(sum(said[1:]))
            sizes.append(len(choice.encode()))
    logprobs = token_logprobs(model, sequences, special(tokenizer, SEPARATOR))
    scores = (
        lp[len(lp) - n :].double().sum().item() / size for lp, n, size in zip(logprobs, counted, sizes, strict=True)
    )
    return [[next(scores) for _ in row["choices"]] for row in rows]


def sequence_kl(
    policy: GPT, reference: GPT, prompts: Sequence[list[int]], answers: Sequence[list[int]], pad: int
) -> list[float]:
    """For each answer the policy drew: sum over its tokens of log p_policy - log p_reference, in nats.

    Its mean over answers drawn at temperature 1 estimates KL(policy || reference) of whole answers; single values may
    be negative and none is clamped.
    """
    sequences = [p + a for p, a in zip(prompts, answers, strict=True)]
    pairs = zip(token_logprobs(policy, sequences, pad), token_logprobs(reference, sequences, pad), strict=True)
    return [
        (ours.double() - theirs.double())[len(prompt) - 1 :].sum().item()
        for (ours, theirs), prompt in zip(pairs, prompts, strict=True)
    ]

"""What a model's probabilities say: the likeliest of four choices, the drift from a reference; and what xz says.

All sums are taken in float64 over float32 log-probabilities.
"""

import lzma
from collections.abc import Sequence
from typing import Any

from components.data.chat import SEPARATOR, encode, special
from components.model.checkpoint import Checkpoint
from components.model.gpt import GPT
from components.model.losses import token_logprobs


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

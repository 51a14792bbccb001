"""A rollout: answers from the policy as it is, and what the other models make of them. Steps 1 and 2 of ppo.py."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from components.model.checkpoint import default_device as device
from components.model.generate import generate
from components.model.gpt import GPT
from components.model.lora import without
from components.model.losses import pad_right
from components.train import rl, vllm_rollout
from components.train.loop import Keeping
from components.train.questions import Judge, Question


class Answering(Keeping, frozen=True, extra="forbid"):
    """What a recipe says of its rollouts."""

    batch: int = Field(ge=1)  # prompts of a rollout
    group: int = Field(ge=1)  # answers to each
    minibatches: int = Field(ge=1)
    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(gt=0)
    sampler: Literal["forja", "vllm"]  # whose random numbers the answers come from
    kl_estimator: rl.Estimator
    unfinished: float = Field(allow_inf_nan=False)  # the score of an answer that never ends


class Rollout(NamedTuple):
    """N answers and what the models think of them. Position t of [N, T-1] is about the token ids[:, t + 1]."""

    ids: Tensor  # [N, T] prompt and answer, padded behind
    mask: Tensor  # [N, T-1] True where the token is the policy's own
    logprobs: Tensor  # [N, T-1] of the policy as it sampled
    reference: Tensor  # [N, T-1] log-probabilities of the frozen SFT model
    values: Tensor  # [N, T-1] the return the value model expects before the token
    scores: Tensor  # [N] of the judge, or the penalty for an answer that never ended
    groups: Tensor  # [N] the number of the prompt that it answers
    kept: "Reading | None" = None  # of all rows at once: what the first pass over them would compute again


def trimmed(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """ids [n, T] and mask [n, T-1] without the columns in which every row is padding."""
    width = int(mask.any(0).nonzero().max()) + 1
    return ids[:, : width + 1], mask[:, :width]


class Reading(NamedTuple):
    """With the way back to the weights that they come from."""

    logprobs: Tensor
    values: Tensor | None


def answer_logprobs(model: Any, ids: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """log pi [N, T-1] of the answers' tokens, 0 elsewhere; what is sampled from is softmax(logits / temperature)."""
    return spread(model(ids[:, :-1], at=mask, targets=ids[:, 1:][mask], temperature=temperature), mask)


def spread(nats: Tensor, mask: Tensor) -> Tensor:
    """Minus the n numbers, where `mask` says they belong."""
    return torch.zeros(mask.shape, device=nats.device).masked_scatter(mask, -nats)


def entropy_of(policy: GPT, hidden: Tensor, temperature: float) -> float:
    """The summed entropy of softmax(logits / temperature) behind normed states [n, width], some rows at a time."""
    total = 0.0
    for some in hidden.split(max(1, (1 << 20) // policy.config.vocab_size)):
        logits = policy.logits(some) / temperature
        total += float((logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)).sum())
    return total


def roll_out(
    policy: GPT,
    reference: GPT | None,
    value: GPT | None,
    judge: Judge,
    asked: Sequence[Question],
    marks: tuple[int, int],
    cfg: Answering,
    seed: int,
    micro: int,
) -> tuple[Rollout, dict[str, float]]:
    """Steps 1 and 2: cfg.group answers to each question, and what the others make of them."""
    pad, end = marks
    started = time.perf_counter()
    several = [(i, question) for i, question in enumerate(asked) for _ in range(cfg.group)]
    prompts = [question["ids"] for _, question in several]
    sample: Callable[..., list[list[int]]] = generate
    if cfg.sampler == "vllm":
        sample = partial(vllm_rollout.generate, precision=cfg.precision)
    answers = sample(
        policy, prompts, max_new_tokens=cfg.max_new_tokens, stop=end, temperature=cfg.temperature, seed=seed
    )
    sampled = time.perf_counter()
    # In the order of length, so that a minibatch holds like lengths and little padding.
    order = sorted(range(len(several)), key=lambda i: len(prompts[i]) + len(answers[i]))
    several, answers = [several[i] for i in order], [answers[i] for i in order]
    sequences = [question["ids"] + answer for (_, question), answer in zip(several, answers, strict=True)]
    ids = pad_right(sequences, pad, device())
    position = torch.arange(1, ids.shape[1], device=ids.device)
    first = torch.tensor([len(question["ids"]) for _, question in several], device=ids.device)[:, None]
    last = torch.tensor([len(s) for s in sequences], device=ids.device)[:, None]
    mask = (position >= first) & (position < last)

    logprobs, reference_logprobs, values, entropy, kept = read(policy, reference, value, ids, mask, cfg, micro)
    finished = torch.tensor([answer[-1] == end for answer in answers], device=ids.device)
    scores = judge([question for _, question in several], answers).to(ids.device)
    scores = torch.where(finished, scores, torch.full_like(scores, cfg.unfinished))
    kl = rl.kl_estimate(logprobs, reference_logprobs, cfg.kl_estimator)
    metrics = {
        "reward": float(scores.mean()),
        "reward_deviation": float(scores.std(correction=0)),
        "kl": float((kl * mask).sum(1).mean()),
        "entropy": entropy / float(mask.sum()),
        "length": float(mask.sum(1).float().mean()),
        "unfinished": float((~finished).float().mean()),
        "repetition": rl.repetition(answers),
        "perf/rollout_s": sampled - started,
        "perf/scoring_s": time.perf_counter() - sampled,
    }
    groups = torch.tensor([i for i, _ in several], device=ids.device)
    return Rollout(ids, mask, logprobs, reference_logprobs, values, scores, groups, kept), metrics


@torch.no_grad()
def read(
    policy: GPT, reference: GPT | None, value: GPT | None, ids: Tensor, mask: Tensor, cfg: Answering, micro: int
) -> tuple[Tensor, Tensor, Tensor, float, Reading | None]:
    """log pi, log ref and V at each token of the answers [N, T-1], and the summed entropy of pi there. Without a
    reference it is the policy without its adapters; without a value model V is 0.

    Read in the update's own pieces, of `micro` rows, in its own precision and with its own kernels, which with
    gradients are others, so that the first ratio is exactly 1. Where one piece is all, it is given back with its way
    back, and the update's first pass need not read again.
    """
    logprobs, ref, values = (torch.zeros(mask.shape, device=ids.device) for _ in range(3))
    entropy, kept = 0.0, None
    pieces = [part for rows in torch.arange(len(ids)).chunk(cfg.minibatches) for part in rows.split(micro)]
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
        for part in pieces:
            chunk, own = trimmed(ids[part], mask[part])
            width = own.shape[1]
            with torch.enable_grad():
                hidden = policy.hidden(chunk[:, :-1])[own]
                new = spread(policy.nats(hidden, chunk[:, 1:][own], cfg.temperature), own)
                judged = None if value is None else value(chunk[:, :-1])
            kept = Reading(new, judged) if len(pieces) == 1 else None
            logprobs[part, :width] = new.detach()
            if judged is not None:
                values[part, :width] = judged.detach()
            entropy += entropy_of(policy, hidden.detach(), cfg.temperature)
            with without(policy) if reference is None else nullcontext():
                ref[part, :width] = answer_logprobs(reference or policy, chunk, own, cfg.temperature)
    return logprobs, ref, values, entropy, kept

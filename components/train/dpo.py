"""Learning from preferences without rollouts: DPO (Rafailov et al. 2023), IPO (Azar et al. 2023) and KTO (Ethayarajh et
al. 2024), as steps of the stage `ppo`.

The policy pi learns, the reference (SFT) is frozen. With h = log pi(answer | prompt) - log ref(answer | prompt), summed
over the tokens of the answer alone, beta h is the reward that the policy stands for, and no value model is needed:

dpo  a pair: -log sigmoid(beta (h(chosen) - h(rejected)))  (eq. 7)
ipo  a pair: (h(chosen) - h(rejected) - 1 / (2 beta))^2  (eq. 17, whose tau is beta here)
kto  a good answer: desirable (1 - sigmoid(beta (h - z0))), a bad one: undesirable (1 - sigmoid(beta (z0 - h)))  (eq. 8)
     z0 = max(0, mean of h over the batch's prompts with the answer to another one), a number: no gradient goes through

The reference reads every batch anew, in the same pieces and precision as the policy: h is 0 at first but for rounding,
in bfloat16 too, and nothing has to be kept over a kill.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from tokenizers import Tokenizer
from torch import Tensor, nn

from components.data.batches import bucketed
from components.data.tokenize import rows
from components.model.checkpoint import default_device as device
from components.model.engine import Engine
from components.model.generate import generate
from components.model.gpt import GPT
from components.model.lora import without
from components.model.losses import by_length, pad_right
from components.model.optim import schedule
from components.model.ranks import added_up, split
from components.train.loop import Skips
from components.train.questions import Question
from components.train.reward import Item, Pair, Single, items_of, learnable
from components.train.rollout import Answering

KINDS = ("dpo", "ipo", "kto")
Row = dict[str, float]
Text = tuple[list[int], int]  # the tokens of a prompt and its answer, and how many of them are the prompt's


class Preferring(Answering, frozen=True, extra="forbid"):
    """What a recipe says of learning from preferences."""

    algorithm: Literal["ppo", "grpo", "dpo", "ipo", "kto"]
    beta: float = Field(gt=0)  # the larger, the closer to SFT; of ipo, 1 / (2 beta) is the lead that is asked for
    desirable: float = Field(ge=0)  # kto's weight of a good answer
    undesirable: float = Field(ge=0)  # and of a bad one
    long: Literal["cut", "drop"]  # what becomes of conversations longer than the context
    val_pairs: int = Field(ge=1)


class Preferences(NamedTuple):
    """Rows to learn from and to measure by, as tokens: pairs, or for kto single answers; and what was left out."""

    train: list[Item]
    heldout: list[Item]
    lengths: list[int]  # of those to learn from, in tokens
    counts: dict[str, int]  # of rows to learn from, and of those left out


class Learner(NamedTuple):
    """What a step works with. Without a reference it is the policy without its adapters."""

    policy: Engine
    reference: GPT | None
    rows: Preferences
    pad: int
    skips: Skips
    over: Callable[[Row], bool]  # whether a row's KL is more than the recipe allows


def preferences(cfg: Preferring, path: Path, tokenizer: Tokenizer, prompts: dict, context: int) -> Preferences | None:
    """The rows of preferences.jsonl. To kto a pair is a good answer and a bad one; the others leave out answers that
    were judged by themselves. None where the recipe learns from rollouts.

    Raises ForjaError where there is nothing to learn from, or to measure by.
    """
    if cfg.algorithm not in KINDS:
        return None
    table: dict[str, list[dict]] = {"train": [], "val": [], "test": []}
    for row in rows(path):
        table[row["split"]].append(row)
    train, dropped = items_of(tokenizer, table["train"], prompts, context, long=cfg.long)
    heldout, _ = items_of(tokenizer, table["val"][: cfg.val_pairs], prompts, context, long=cfg.long)
    if cfg.algorithm == "kto":
        train, heldout = singles(train), singles(heldout)
    else:
        judged = sum(isinstance(item, Single) for item in train)
        dropped |= {"single": judged} if judged else {}
        train = [item for item in train if isinstance(item, Pair)]
        heldout = [item for item in heldout if isinstance(item, Pair)]
    learnable(path, train, heldout, dropped, f"ppo.algorithm {cfg.algorithm}", 1)
    counts = {"rows": len(train)} | {f"dropped.preferences.{why}": n for why, n in dropped.items()}
    lengths = [max(len(tokens) for tokens, _ in texts_of([item])) for item in train]
    return Preferences(train, heldout, lengths, counts)


def singles(items: Sequence[Item]) -> list[Item]:
    """Every answer by itself: the chosen one of a pair is good, the rejected one bad."""
    out: list[Item] = []
    for item in items:
        if isinstance(item, Pair):
            out += [Single(item.chosen, True, item.asked), Single(item.rejected, False, item.asked)]
        else:
            out.append(item)
    return out


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta (h_chosen - h_rejected)), elementwise."""
    return -F.logsigmoid(beta * (chosen - rejected))


def ipo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """(h_chosen - h_rejected - 1 / (2 beta))^2, elementwise: the lead is to be 1 / (2 beta), not as large as can be."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def kto_loss(h: Tensor, good: Tensor, z0: float, beta: float, desirable: float, undesirable: float) -> Tensor:
    """weight (1 - sigmoid(+-beta (h - z0))), elementwise: + where `good` [n] boolean, - where it is not."""
    sign = torch.where(good, 1.0, -1.0)
    weight = torch.where(good, desirable, undesirable)
    return weight * (1 - torch.sigmoid(sign * beta * (h - z0)))


def summed_logprobs(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """log p [n] of the tokens ids[:, 1:] at `mask` [n, T-1], summed over each row."""
    nats = model(ids[:, :-1], at=mask, targets=ids[:, 1:][mask])
    return -torch.zeros(mask.shape, device=ids.device).masked_scatter(mask, nats).sum(1)


def log_ratios(policy: nn.Module, reference: GPT | None, texts: Sequence[Text], pad: int) -> Tensor:
    """h [n] of each text's answer. Without a reference it is the policy without its adapters."""
    ids = pad_right([tokens for tokens, _ in texts], pad, device())
    position = torch.arange(1, ids.shape[1], device=ids.device)
    first = torch.tensor([asked for _, asked in texts], device=ids.device)[:, None]
    last = torch.tensor([len(tokens) for tokens, _ in texts], device=ids.device)[:, None]
    mask = (position >= first) & (position < last)
    with torch.no_grad(), without(policy) if reference is None else nullcontext():
        known = summed_logprobs(policy if reference is None else reference, ids, mask)
    return summed_logprobs(policy, ids, mask) - known


def texts_of(items: Sequence[Item]) -> list[Text]:
    """What is read of items: the chosen answers of the pairs, then the rejected ones, then the single answers."""
    pairs = [item for item in items if isinstance(item, Pair)]
    singles = [(item.ids, item.asked) for item in items if isinstance(item, Single)]
    return [(p.chosen, p.asked) for p in pairs] + [(p.rejected, p.asked) for p in pairs] + singles


def mismatched(items: Sequence[Item], context: int) -> list[Text]:
    """Each prompt with the answer to the next one that is another, in a circle; none where all prompts are alike.

    Where the two do not fit the context together, the prompt's beginning goes.
    """
    asked = [ids[:n] for ids, n in texts_of(items)]
    answers = [ids[n:] for ids, n in texts_of(items)]
    out: list[Text] = []
    for i, prompt in enumerate(asked):
        others = ((i + k) % len(asked) for k in range(1, len(asked)))
        other = next((j for j in others if asked[j] != prompt), None)
        if other is not None:
            answer = answers[other]
            kept = prompt[max(0, len(prompt) + len(answer) - context) :]
            out.append((kept + answer, len(kept)))
    return out


def compared(cfg: Preferring, h: Tensor, items: Sequence[Item], z0: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses, one an item, from h [n] of `texts_of(items)`, and the sums of what is measured beside."""
    if cfg.algorithm == "kto":
        good = torch.tensor([isinstance(item, Single) and item.good for item in items], device=h.device)
        losses = kto_loss(h, good, z0, cfg.beta, cfg.desirable, cfg.undesirable)
        lead = torch.where(good, h - z0, z0 - h)
    else:
        chosen, rejected = h.chunk(2)
        good = torch.arange(len(h), device=h.device) < len(items)
        losses = (dpo_loss if cfg.algorithm == "dpo" else ipo_loss)(chosen, rejected, cfg.beta)
        lead = chosen - rejected
    sums = {"right": (0.5 + 0.5 * lead.detach().sign()).sum(), "n_good": good.sum(), "n_bad": (~good).sum()}
    return losses, sums | {"good": h.detach()[good].sum(), "bad": h.detach()[~good].sum()}


def told(cfg: Preferring, sums: Row, n: int) -> Row:
    """Those sums over n items as a row: how much likelier than at first, in nats, the chosen and the rejected answers
    are; `margin` is the distance of their implied rewards."""
    row = {"loss": sums["loss"] / n, "accuracy": sums["right"] / n}
    for name, kind in (("chosen_drift", "good"), ("rejected_drift", "bad")):
        if sums[f"n_{kind}"]:
            row[name] = sums[kind] / sums[f"n_{kind}"]
    if sums["n_good"] and sums["n_bad"]:
        row["margin"] = cfg.beta * (row["chosen_drift"] - row["rejected_drift"])
    return row


@torch.no_grad()
def baseline(cfg: Preferring, by: Learner, items: Sequence[Item]) -> float:
    """z0 of a batch, as all ranks see it: an estimate of KL(pi, ref). 0 where every prompt of it is the same."""
    texts = mismatched(items, by.policy.model.config.context)
    total = torch.zeros(1, dtype=torch.float64, device=device())
    with torch.autocast(device().type, torch.bfloat16, enabled=cfg.precision == "bf16"):
        for part in split(texts, by.policy.micro):
            total += log_ratios(by.policy.model, by.reference, part, by.pad).double().sum()
    return max(0.0, added_up(total)[0] / max(1, len(texts)))


def learn(cfg: Preferring, by: Learner, history: list[Row], step: int) -> Row:
    """One step of the policy on a batch of rows, which (seed, step) names.

    `kl` is that of the evaluation before it; where that is over the budget nothing is learnt any more.
    """
    row = {"kl": history[-1]["val_kl"]} if history and "val_kl" in history[-1] else {}
    if by.over(row):
        return row
    items = [by.rows.train[i] for i in bucketed(by.rows.lengths, cfg.seed, step, cfg.batch)]
    z0 = baseline(cfg, by, items) if cfg.algorithm == "kto" else 0.0
    by.policy.set_rate(schedule(cfg, step, cfg.steps))
    for part in split(items, by.policy.micro):
        with torch.autocast(device().type, torch.bfloat16, enabled=cfg.precision == "bf16"):
            h = log_ratios(by.policy.ds, by.reference, texts_of(part), by.pad)
        losses, sums = compared(cfg, h, part, z0)
        by.policy.step(losses.sum(), len(items), sums)
    said = f"the loss is {by.policy.sums['loss'] / len(items)}, the gradient's norm {by.policy.grad_norm}"
    by.skips.note(by.policy.skipped, step, said, cfg.lr)
    row |= {"z0": z0} if cfg.algorithm == "kto" else {}
    if by.policy.skipped:
        return row | {"skipped": float(by.skips.total)}
    return row | told(cfg, by.policy.sums, len(items)) | {"grad_norm": by.policy.grad_norm}


def measured(
    cfg: Preferring,
    pairs: Preferences,
    reference: GPT | None,
    model: GPT,
    asked: Sequence[Question],
    marks: tuple[int, int],
) -> Row:
    """What `learn` says of its rows, of held-out ones; and `kl`, the divergence from the reference over answers that
    `model` samples to held-out prompts."""
    pad, end = marks
    items = pairs.heldout
    h = ratios(model, reference, texts_of(items), pad)
    others = ratios(model, reference, mismatched(items, model.config.context), pad) if cfg.algorithm == "kto" else h[:0]
    losses, sums = compared(cfg, h, items, max(0.0, float(others.mean())) if len(others) else 0.0)
    sums |= {"loss": losses.sum()}
    row = told(cfg, {name: float(value) for name, value in sums.items()}, len(items))
    questions = [question["ids"] for question in asked]
    said = generate(
        model, questions, max_new_tokens=cfg.max_new_tokens, stop=end, temperature=cfg.temperature, seed=cfg.seed
    )
    texts = [(question + answer, len(question)) for question, answer in zip(questions, said, strict=True)]
    return row | {"kl": float(ratios(model, reference, texts, pad).mean())}


@torch.no_grad()
def ratios(model: GPT, reference: GPT | None, texts: Sequence[Text], pad: int) -> Tensor:
    """h [n] of any number of texts, float32 on the CPU."""
    out = torch.zeros(len(texts))
    for part in by_length([len(tokens) for tokens, _ in texts], 8192):
        out[part] = log_ratios(model, reference, [texts[i] for i in part], pad).cpu()
    return out

"""The reward model: which of two answers is better (Bradley & Terry 1952; Ouyang et al. 2022).

SFT's trunk with a scalar head. The score of an answer is the head's value at its last token, where the model has read
all of it. It learns from pairs, a better answer and a worse one, and from single answers that were judged good or bad.
It leaves a share of the training rows to a second one, the referee (referee.py), which PPO never learns from.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from tokenizers import Tokenizer
from torch import Tensor, nn

from components.artifact import ForjaError, to_json
from components.data.batches import bucketed
from components.data.chat import SEPARATOR, encode, encode_prompt, encode_within, special
from components.data.sources import hashed
from components.data.templates import Template, template_of
from components.data.tokenize import rows
from components.log import Log
from components.model.checkpoint import TOKENIZER, load, save
from components.model.checkpoint import default_device as device
from components.model.gpt import GPT
from components.model.losses import by_length, pad_right, preference_loss
from components.train import judgement
from components.train.loop import FineTuning, fit

CALIBRATION = "calibration.json"


class Config(FineTuning, frozen=True, extra="forbid"):
    share: float = Field(ge=0, le=1)  # of the training rows, chosen by a hash of what they are about
    margin: float = Field(ge=0)  # by which the better answer should lead; a row may have its own
    val_rows: int = Field(ge=2)


class Pair(NamedTuple):
    """Two dialogues as tokens, alike but for the answer that they end with."""

    chosen: list[int]
    rejected: list[int]
    margin: float
    asked: int  # the tokens that both begin with, those before the answer

    @property
    def longer(self) -> int:
        """By how many tokens the better answer is the longer one."""
        return len(self.chosen) - len(self.rejected)


class Single(NamedTuple):
    """A dialogue whose answer was judged by itself."""

    ids: list[int]
    good: bool
    asked: int  # its tokens before the answer


Item = Pair | Single


def items_of(
    tokenizer: Tokenizer,
    table: Iterable[Mapping[str, Any]],
    prompts: Mapping[str, Template],
    context: int,
    margin: float = 0.0,
    long: Literal["cut", "drop"] = "drop",
) -> tuple[list[Item], Counter[str]]:
    """The rows of preferences as tokens, and how many are left out for what: `equal` answers, or too `long`.

    A row with `chosen` or `rejected` alone is a single answer, good or bad.
    """
    items: list[Item] = []
    dropped: Counter[str] = Counter()
    for row in table:
        said = {key: row[key] for key in ("chosen", "rejected") if row.get(key) is not None}
        found = dialogues(tokenizer, row["messages"], list(said.values()), template_of(prompts, row), context, long)
        if found is None:
            dropped["long"] += 1
            continue
        asked, whole = found
        if len(whole) == 1:
            items.append(Single(whole[0], "chosen" in said, asked))
        elif whole[0] == whole[1]:
            dropped["equal"] += 1
        else:
            items.append(Pair(whole[0], whole[1], _margin(row, margin), asked))
    return items, dropped


def _margin(row: Mapping[str, Any], usual: float) -> float:
    """The row's own margin, or the usual one."""
    own = row.get("margin", usual)
    if not isinstance(own, int | float):
        raise ForjaError(f"preferences.jsonl: row {row['id']} has the margin {own!r}; make it a number, or drop it")
    return float(own)


def dialogues(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    answers: Sequence[Mapping[str, Any]],
    template: Template,
    context: int,
    long: Literal["cut", "drop"],
) -> tuple[int, list[list[int]]] | None:
    """How many tokens stand before an answer, and the dialogue with each of the answers, up to the token that ends it.

    All are cut alike where the longest does not fit the context; None where that is not wanted, or not possible.
    """
    asked = encode_prompt(tokenizer, messages, template)
    tails = [_spoken(*encode(tokenizer, [*messages, answer], template))[len(asked) :] for answer in answers]
    longest = max(range(len(tails)), key=lambda i: len(tails[i]))
    if len(asked) + len(tails[longest]) > context:
        whole = [*messages, answers[longest]]
        cut = encode_within(tokenizer, whole, template, context) if long == "cut" else None
        if cut is None:
            return None
        asked = _spoken(*cut)[: -len(tails[longest])]
    return len(asked), [asked + tail for tail in tails]


def _spoken(ids: list[int], said: list[bool]) -> list[int]:
    """A conversation up to the last token that the assistant says: what the template writes behind is not scored."""
    return ids[: len(said) - said[::-1].index(True)]


def last_values(model: nn.Module, sequences: Sequence[Sequence[int]], pad: int) -> Tensor:
    """The scalar head's value [N] at each sequence's last token."""
    ids = pad_right(sequences, pad, device())
    last = torch.tensor([len(s) - 1 for s in sequences], device=ids.device)
    return model(ids).gather(1, last[:, None]).squeeze(1)


@torch.no_grad()
def score(model: GPT, sequences: Sequence[Sequence[int]], pad: int, batch_tokens: int = 8192) -> Tensor:
    """The normalised reward [N], float32 on the CPU, of dialogues that end with an answer, in the order given."""
    out = torch.empty(len(sequences))
    for batch in by_length([len(s) for s in sequences], batch_tokens):
        out[batch] = last_values(model, [sequences[i] for i in batch], pad).cpu()
    return out


def item_loss(model: nn.Module, items: Sequence[Item], pad: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The summed loss, all answers in one forward pass, and the number of items judged right.

    Of a pair: Bradley-Terry. Of a single answer: -log sigmoid(score) where it is good and -log sigmoid(-score) where it
    is bad; the head's bias is what a middling answer is measured from.
    """
    pairs = [item for item in items if isinstance(item, Pair)]
    singles = [item for item in items if isinstance(item, Single)]
    sequences = [p.chosen for p in pairs] + [p.rejected for p in pairs] + [s.ids for s in singles]
    chosen, rejected, alone = last_values(model, sequences, pad).split([len(pairs), len(pairs), len(singles)])
    margins = torch.tensor([p.margin for p in pairs], device=chosen.device)
    alone = alone * torch.tensor([1.0 if s.good else -1.0 for s in singles], device=alone.device)
    loss = preference_loss(chosen, rejected, margins).sum() - F.logsigmoid(alone).sum()
    return loss, {"accuracy": (chosen > rejected).sum() + (alone > 0).sum()}


def leads(model: GPT, items: Sequence[Item], pad: int, swapped: bool = False) -> list[float]:
    """By how much each pair's better answer leads, and a good answer's score, or minus a bad one's.

    `swapped`: the two answers of a pair change places in the batch, which should change nothing.
    """
    sizes = [len(item.ids) if isinstance(item, Single) else max(map(len, item[:2])) for item in items]
    out = [0.0] * len(items)
    for batch in by_length(sizes, 8192):
        sequences, signs = [], []
        for i in batch:
            item = items[i]
            if isinstance(item, Pair):
                sequences += [item.rejected, item.chosen] if swapped else [item.chosen, item.rejected]
                signs += [-1.0, 1.0] if swapped else [1.0, -1.0]
            else:
                sequences.append(item.ids)
                signs.append(1.0 if item.good else -1.0)
        with torch.no_grad():
            values = iter((last_values(model, sequences, pad).cpu() * torch.tensor(signs)).tolist())
        for i in batch:
            out[i] = next(values) + (next(values) if isinstance(items[i], Pair) else 0.0)
    return out


def with_scalar_head(policy: GPT) -> GPT:
    """The same trunk under a scalar head that starts at zero."""
    model = GPT(policy.config.model_copy(update={"head": "scalar"}))
    trunk = {k: v for k, v in policy.state_dict().items() if not k.startswith("head.")}
    model.load_state_dict(trunk, strict=False)
    nn.init.zeros_(model.head.weight)
    return model


def worth(
    model: GPT, train: Sequence[Item], heldout: Sequence[Item], pad: int
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """What a trained model's verdicts on held-out rows are worth, and its calibration curve (judgement.py)."""
    found = leads(model, heldout, pad)
    sure = judgement.accuracy(found)
    bins = judgement.calibration(found)
    metrics = {"loss": judgement.nats(found), "accuracy": sure.value, "accuracy.low": sure.low}
    metrics |= {"accuracy.high": sure.high, "accuracy.n": float(sure.n)}
    metrics["calibration_error"] = judgement.calibration_error(bins)
    pairs = [(lead, item.longer) for lead, item in zip(found, heldout, strict=True) if isinstance(item, Pair)]
    learnt = [item.longer for item in train if isinstance(item, Pair)]
    if pairs and learnt:
        metrics |= judgement.by_length(*zip(*pairs, strict=True))
        metrics |= judgement.length_only(learnt, [longer for _, longer in pairs])
        other = leads(model, heldout, pad, swapped=True)
        metrics["swapped_agreement"] = sum((a > 0) == (b > 0) for a, b in zip(found, other, strict=True)) / len(found)
    curve = [{"confidence": b.confidence, **b.right._asdict()} for b in bins]
    return metrics, curve


@torch.no_grad()
def normalise(model: GPT, heldout: Sequence[Item], pad: int) -> float:
    """Give scores mean 0 and deviation 1 over held-out answers, folded into the head, so that a reward has a unit.

    Returns the deviation that they had. Where they do not differ there is no unit, and only the mean is taken away.
    """
    sequences = [s for item in heldout for s in (item[:2] if isinstance(item, Pair) else item[:1])]
    values = score(model, sequences, pad).double()
    deviation = float(values.std())
    unit = deviation if deviation > 1e-6 else 1.0
    model.head.bias.sub_(float(values.mean())).div_(unit)
    model.head.weight.div_(unit)
    return deviation


def learnable(
    path: Path,
    train: Sequence[Item],
    heldout: Sequence[Item],
    dropped: Counter[str],
    what: str = "a reward model",
    least: int = 2,
) -> None:
    """Raises ForjaError where there is nothing that `what` could be learnt from, or `least` to measure it by."""
    left_out = "".join(f"; {n} left out: {why}" for why, n in sorted(dropped.items()))
    if not train or len(heldout) < least:
        counts = f"{len(train)} training and {len(heldout)} held-out rows"
        raise ForjaError(f"{path}: {counts}; {what} needs 1 and {least} at least{left_out}")
    judged = {item.good for item in train if isinstance(item, Single)}
    if len(judged) == 1 and not any(isinstance(item, Pair) for item in train):
        only = "good" if True in judged else "bad"
        raise ForjaError(f"{path}: every judged answer is {only}; {what} needs good and bad ones{left_out}")


def place(row: Mapping[str, Any]) -> float:
    """Where a training row lies between 0 and 1, by a hash of its object: rows about one thing lie together.

    The reward model learns from those below its `share`, the referee from those above 1 minus its own.
    """
    return hashed(f"share/{row['object']}") / 2**64


def run(cfg: Config, validate: Path, sft: Path, out: Path, scratch: Path, log: Log) -> dict[str, float]:
    return learn(cfg, lambda row: place(row) < cfg.share, validate, sft, out, scratch, log)


def learn(
    cfg: Config,
    mine: Callable[[Mapping[str, Any]], bool],
    validate: Path,
    sft: Path,
    out: Path,
    scratch: Path,
    log: Log,
) -> dict[str, float]:
    """A reward model of the training rows that are `mine`, measured on the same held-out rows whichever these are."""
    # 1. SFT's trunk, a new head.
    policy, tokenizer, prompts = load(sft, device())
    model = with_scalar_head(policy).to(device())
    pad = special(tokenizer, SEPARATOR)

    # 2. Rows as tokens.
    path = validate / "preferences.jsonl"
    table: dict[str, list[dict]] = {"train": [], "val": [], "test": []}
    for row in rows(path):
        table[row["split"]].append(row)
    read: Callable[..., tuple[list[Item], Counter[str]]] = lambda some: items_of(  # noqa: E731
        tokenizer, some, prompts, model.config.context, cfg.margin, cfg.long
    )
    train, dropped = read([row for row in table["train"] if mine(row)])
    heldout, _ = read(table["val"][: cfg.val_rows])
    learnable(path, train, heldout, dropped)
    lengths = [max(map(len, item[:2])) if isinstance(item, Pair) else len(item.ids) for item in train]

    def measure(model: GPT) -> dict[str, float]:
        found = leads(model, heldout, pad)
        return {"loss": judgement.nats(found), "accuracy": judgement.accuracy(found).value}

    # 3. Train.
    model, last = fit(
        model,
        cfg,
        lambda step: [train[i] for i in bucketed(lengths, cfg.seed, step, cfg.batch)],
        lambda model, items: item_loss(model, items, pad),
        lambda item: 1,
        measure,
        scratch,
        log,
        keep=cfg.keep,
    )

    # 4. What its verdicts are worth, in the unit that it learnt in; then the unit is the held-out answers' deviation.
    metrics, curve = worth(model.eval(), train, heldout, pad)
    (out / CALIBRATION).write_text(to_json(curve), encoding="utf-8")
    deviation = normalise(model, heldout, pad)
    save(model, out, sft / TOKENIZER, prompts)
    metrics = {f"val_{name}": value for name, value in metrics.items()}
    return (
        last
        | metrics
        | {
            "score_deviation": deviation,
            "rows": float(len(train)),
            "dropped": float(sum(dropped.values())),
            **{f"dropped.{why}": float(n) for why, n in dropped.items()},
        }
    )

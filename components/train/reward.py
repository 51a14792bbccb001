"""The reward model: which of two answers is better (Bradley & Terry 1952; Ouyang et al. 2022).

SFT's trunk with a scalar head. The score of an answer is the head's value at its last token, where the model has read
all of it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from tokenizers import Tokenizer
from torch import Tensor, nn

from components.artifact import ForjaError
from components.data.batches import bucketed
from components.data.chat import SEPARATOR, encode, special
from components.data.tokenize import rows
from components.log import Log
from components.model.checkpoint import TOKENIZER, load, save
from components.model.checkpoint import default_device as device
from components.model.gpt import GPT
from components.model.losses import by_length, pad_right, preference_loss
from components.train.loop import Training, fit

Pair = tuple[list[int], list[int]]  # (dialogue + chosen, dialogue + rejected) as tokens


class Config(Training, frozen=True, extra="forbid"):
    val_rows: int = Field(ge=2)


def pairs(tokenizer: Tokenizer, table: Sequence[dict[str, Any]], prompts: dict, context: int) -> list[Pair]:
    """The preference rows as tokens, without those that do not fit the context or whose two answers are the same."""
    out = []
    for row in table:
        template = prompts[row["lang"]]
        chosen, _ = encode(tokenizer, [*row["messages"], row["chosen"]], template)
        rejected, _ = encode(tokenizer, [*row["messages"], row["rejected"]], template)
        if max(len(chosen), len(rejected)) <= context and chosen != rejected:
            out.append((chosen, rejected))
    return out


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


def pair_loss(model: nn.Module, items: Sequence[Pair], pad: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The summed Bradley-Terry loss, both answers of every pair in one forward pass; and the pairs ranked right."""
    values = last_values(model, [chosen for chosen, _ in items] + [rejected for _, rejected in items], pad)
    chosen, rejected = values.chunk(2)
    return preference_loss(chosen, rejected).sum(), {"accuracy": (chosen > rejected).sum()}


def with_scalar_head(policy: GPT) -> GPT:
    """The same trunk under a scalar head that starts at zero."""
    model = GPT(policy.config.model_copy(update={"head": "scalar"}))
    trunk = {k: v for k, v in policy.state_dict().items() if not k.startswith("head.")}
    model.load_state_dict(trunk, strict=False)
    nn.init.zeros_(model.head.weight)
    return model


def run(cfg: Config, validate: Path, sft: Path, out: Path, scratch: Path, log: Log) -> dict[str, float]:
    # 1. SFT's trunk, a new head.
    policy, tokenizer, prompts = load(sft, device())
    model = with_scalar_head(policy).to(device())
    pad = special(tokenizer, SEPARATOR)

    # 2. Pairs as tokens.
    path = validate / "preferences.jsonl"
    table: dict[str, list[dict]] = {"train": [], "val": [], "test": []}
    for row in rows(path):
        table[row["split"]].append(row)
    context = model.config.context
    train = pairs(tokenizer, table["train"], prompts, context)
    heldout = pairs(tokenizer, table["val"][: cfg.val_rows], prompts, context)
    if not train or len(heldout) < 2:
        raise ForjaError(f"{path}: {len(train)} training and {len(heldout)} held-out pairs; a reward model needs both")
    lengths = [max(len(a), len(b)) for a, b in train]

    @torch.no_grad()
    def measure(model: GPT) -> dict[str, float]:
        loss, others = pair_loss(model, heldout, pad)
        return {"loss": float(loss) / len(heldout), "accuracy": float(others["accuracy"]) / len(heldout)}

    # 3. Train.
    model, last = fit(
        model,
        cfg,
        lambda step: [train[i] for i in bucketed(lengths, cfg.seed, step, cfg.batch)],
        lambda model, items: pair_loss(model, items, pad),
        lambda pair: 1,
        measure,
        scratch,
        log,
    )

    # 4. Normalise: mean 0 and deviation 1 over held-out answers, folded into the head, so a reward has a unit.
    values = score(model.eval(), [s for pair in heldout for s in pair], pad)
    mean, deviation = values.mean().to(device()), values.std().clamp(min=1e-6).to(device())
    with torch.no_grad():
        model.head.bias.sub_(mean).div_(deviation)
        model.head.weight.div_(deviation)
    save(model, out, sft / TOKENIZER, prompts)
    final = measure(model)
    return last | {
        "val_loss": final["loss"],
        "val_accuracy": final["accuracy"],
        "rows": float(len(train)),
        "dropped": float(len(table["train"]) - len(train)),
    }

"""Supervised fine-tuning: the model learns to answer; the loss is on what the assistant says, alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from tokenizers import Tokenizer
from torch import Tensor, nn

from components.artifact import ForjaError
from components.data.batches import bucketed
from components.data.chat import SEPARATOR, encode, special
from components.data.templates import checked, stop
from components.data.tokenize import rows
from components.log import Log
from components.model.checkpoint import TOKENIZER, load, save
from components.model.checkpoint import default_device as device
from components.model.gpt import GPT
from components.model.interop import TEMPLATE
from components.model.losses import by_length, pad_right
from components.train.loop import Training, fit
from components.train.samples import question_items, write_samples
from components.train.zloss import nats_and_z

Prompts = Annotated[dict[str, dict[str, str]], AfterValidator(checked)]
Example = tuple[list[int], list[bool]]  # tokens, and which of them the assistant says


class Config(Training, frozen=True, extra="forbid"):
    z_loss: float = Field(ge=0)
    prompts: Prompts
    val_rows: int = Field(ge=1)
    sample_rows: int = Field(ge=0)


def examples(
    tokenizer: Tokenizer, table: list[dict], prompts: Prompts, context: int, path: Path
) -> tuple[list[Example], int]:
    """The rows that fit the context, and the number of those that do not.

    Raises ForjaError where a row's language has no template.
    """
    out: list[Example] = []
    for row in table:
        if row["lang"] not in prompts:
            raise ForjaError(
                f"{path}: row {row['id']} is in {row['lang']!r}, and the recipe's prompts are {sorted(prompts)}; "
                f"add conf/prompts/{row['lang']}.yaml to them"
            )
        ids, said = encode(tokenizer, row["messages"], prompts[row["lang"]])
        if len(ids) <= context:
            out.append((ids, said))
    return out, len(table) - len(out)


def with_own(prompts: Prompts, pretrain: Path) -> Prompts:
    """The recipe's templates, with what came with the model in place of `own`."""
    if not any(template.get("jinja") == "own" for template in prompts.values()):
        return prompts
    path = pretrain / TEMPLATE
    if not path.is_file():
        raise ForjaError(f"sft.prompts: own, and no chat template came with {pretrain}; name one of conf/prompts")
    own = json.loads(path.read_bytes())
    return {lang: own if template.get("jinja") == "own" else template for lang, template in prompts.items()}


def answer_loss(
    model: nn.Module, items: Sequence[Example], pad: int, z: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The summed cross-entropy in nats of the assistant's tokens, plus the z-loss; the head reads no other token."""
    ids = pad_right([ids for ids, _ in items], pad, device())
    said = pad_right([said for _, said in items], 0, device()).bool()
    targets = ids[:, 1:][said[:, 1:]]
    if z:
        return nats_and_z(model(ids[:, :-1], at=said[:, 1:]), targets, z)
    return model(ids[:, :-1], at=said[:, 1:], targets=targets).sum(), {}


def run(cfg: Config, validate: Path, pretrain: Path, out: Path, scratch: Path, log: Log) -> dict[str, float]:
    # 1. Where pretraining left off.
    model, tokenizer, _ = load(pretrain, device())
    pad = special(tokenizer, SEPARATOR)
    context = model.config.context
    prompts = with_own(cfg.prompts, pretrain)
    end = stop(tokenizer, prompts)

    # 2. Conversations as tokens, the assistant's own marked.
    path = validate / "instructions.jsonl"
    table: dict[str, list[dict]] = {"train": [], "val": [], "test": []}
    for row in rows(path):
        table[row["split"]].append(row)
    train, dropped = examples(tokenizer, table["train"], prompts, context, path)
    heldout, _ = examples(tokenizer, table["val"][: cfg.val_rows], prompts, context, path)
    if not train or not heldout:
        raise ForjaError(f"{path}: {len(train)} training and {len(heldout)} held-out rows; SFT needs both")
    lengths = [len(ids) for ids, _ in train]

    @torch.no_grad()
    def measure(model: GPT) -> dict[str, float]:
        batches = by_length([len(ids) for ids, _ in heldout], 4096)
        nats = sum(float(answer_loss(model, [heldout[i] for i in batch], pad)[0]) for batch in batches)
        return {"loss": nats / sum(sum(said) for _, said in heldout)}

    # 3. Train.
    before = measure(model)["loss"]
    model, last = fit(
        model,
        cfg,
        lambda step: [train[i] for i in bucketed(lengths, cfg.seed, step, cfg.batch)],
        lambda model, items: answer_loss(model, items, pad, cfg.z_loss),
        lambda example: sum(example[1]),
        measure,
        scratch,
        log,
    )

    # 4. Keep it, with a few held-out answers to look at.
    save(model, out, pretrain / TOKENIZER, prompts)
    items = question_items(tokenizer, table["val"][: cfg.sample_rows], prompts)
    write_samples(out, model.eval(), tokenizer, items, end)
    return last | {
        "val_loss": measure(model)["loss"],
        "val_loss_before": before,
        "rows": float(len(train)),
        "dropped": float(dropped),
    }

"""Supervised fine-tuning: the model learns to answer; the loss is on what the assistant says, alone."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field, model_validator
from tokenizers import Tokenizer
from torch import Tensor, nn

from components.artifact import ForjaError
from components.data.batches import bucketed, pick, windows
from components.data.chat import SEPARATOR, encode, encode_within, special
from components.data.packing import Window, best_fit
from components.data.templates import checked, stop, template_of
from components.data.tokenize import rows
from components.log import Log
from components.model.checkpoint import TOKENIZER, load, save
from components.model.checkpoint import default_device as device
from components.model.gpt import GPT
from components.model.interop import TEMPLATE
from components.model.lora import Lora, adapt, merge
from components.model.losses import by_length, pad_right, text_bits_per_byte
from components.train.loop import FineTuning, fit
from components.train.pretrain import packed_loss
from components.train.samples import question_items, write_samples
from components.train.zloss import nats_and_z

Prompts = Annotated[dict[str, dict[str, str]], AfterValidator(checked)]
Example = tuple[list[int], list[bool]]  # tokens, and which of them the assistant says
REMEMBERED = 1 << 15  # tokens of held-out pretraining text by which forgetting is measured


class Config(FineTuning, frozen=True, extra="forbid"):
    z_loss: float = Field(ge=0)
    prompts: Prompts
    packing: Literal["padded", "bestfit"]  # a conversation a row, or several side by side that do not see each other
    replay: int = Field(ge=0)  # rows of a batch that are windows of the pretraining text, against forgetting it
    lora: Lora | None  # train low-rank adapters alone, merged at the end; None: every weight
    val_rows: int = Field(ge=1)
    sample_rows: int = Field(ge=0)

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.replay >= self.batch:
            raise ValueError(f"replay {self.replay} has to leave room for conversations in a batch of {self.batch}")
        if self.lora is not None and self.matrix_lr is not None:
            raise ValueError("lora needs matrix_lr null: Muon's steps are for whole matrices")
        return self


def examples(
    tokenizer: Tokenizer,
    table: Iterable[Mapping[str, Any]],
    prompts: Prompts,
    context: int,
    long: Literal["cut", "drop"] = "drop",
) -> tuple[list[Example], Counter[str]]:
    """The rows as tokens, and how many are left out for what: too `long`, or an answer that says nothing (`empty`).

    Every example has a token to learn, so that no batch is without one. Raises ForjaError where a row's language has no
    template.
    """
    out: list[Example] = []
    dropped: Counter[str] = Counter()
    for row in table:
        template, answer = template_of(prompts, row), row["messages"][-1]
        if not (answer["content"].strip() or answer.get("tool_calls")):
            dropped["empty"] += 1
            continue
        found: Example | None = encode(tokenizer, row["messages"], template)
        if found is not None and len(found[0]) > context:
            found = encode_within(tokenizer, row["messages"], template, context) if long == "cut" else None
        if found is None:
            dropped["long"] += 1
        elif any(found[1][1:]):
            out.append(found)
        else:
            dropped["empty"] += 1
    return out, dropped


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


def side_by_side(items: Sequence[Example], context: int, pad: int) -> list[Window]:
    """The examples in windows of at most `context` tokens, by best fit; each is read as if it stood alone."""
    lengths = [len(ids) - 1 for ids, _ in items]
    bins, count = best_fit(np.array(lengths), context)
    inputs, targets = np.full((count, context), pad), np.full((count, context), -1)
    sizes: list[list[int]] = [[] for _ in range(count)]
    for (ids, said), row, n in zip(items, bins.tolist(), lengths, strict=True):
        at = sum(sizes[row])
        inputs[row, at : at + n] = ids[:-1]
        targets[row, at : at + n] = np.where(said[1:], ids[1:], -1)
        sizes[row].append(n)
    width = max(map(sum, sizes))
    full = [[*row, width - sum(row)] if sum(row) < width else row for row in sizes]
    return [Window(i[:width], t[:width], row) for i, t, row in zip(inputs, targets, full, strict=True)]


def replayed(shard: Path, context: int, seed: int, step: int, count: int) -> list[Example]:
    """Windows of the pretraining text, every token of which is learnt, as examples of batch `step`."""
    if not count:
        return []
    return [(window.tolist(), [False] + [True] * context) for window in windows(shard, context, seed, step, count)]


def remembered(model: GPT, tokenize: Path, tokenizer: Tokenizer) -> float:
    """Bits per byte of held-out pretraining text, its first whole documents."""
    ends = np.load(tokenize / "val.ends.npy")
    ends = ends[: max(1, int((ends <= REMEMBERED).sum()))]
    tokens = np.load(tokenize / "val.npy", mmap_mode="r")[: int(ends[-1])].astype(np.int64)
    texts = tokenizer.decode_batch([document[:-1].tolist() for document in np.split(tokens, ends[:-1])])
    n_bytes = sum(len(text.encode()) for text in texts)
    return text_bits_per_byte(model, tokens.tolist(), n_bytes, special(tokenizer, SEPARATOR))


def run(
    cfg: Config, validate: Path, tokenize: Path, pretrain: Path, out: Path, scratch: Path, log: Log
) -> dict[str, float]:
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
    train, dropped = examples(tokenizer, table["train"], prompts, context, cfg.long)
    heldout, _ = examples(tokenizer, table["val"][: cfg.val_rows], prompts, context, cfg.long)
    if not train or not heldout:
        why = "".join(f"; {n} left out: {why}" for why, n in sorted(dropped.items()))
        raise ForjaError(f"{path}: {len(train)} training and {len(heldout)} held-out rows; SFT needs both{why}")
    lengths = [len(ids) for ids, _ in train]

    def batch(step: int) -> list[Example]:
        count = cfg.batch - cfg.replay
        if cfg.packing == "padded":  # about equally long ones together
            chosen = bucketed(lengths, cfg.seed, step, count)
        else:
            chosen = pick(cfg.seed, step, count, len(train))
        text = replayed(tokenize / "train.npy", context, cfg.seed, step, cfg.replay)
        return [*(train[i] for i in chosen), *text]

    def loss(model: nn.Module, items: Sequence[Example]) -> tuple[Tensor, dict[str, Tensor]]:
        if cfg.packing == "padded":
            return answer_loss(model, items, pad, cfg.z_loss)
        return packed_loss(model, side_by_side(items, context, pad), cfg.z_loss)

    @torch.no_grad()
    def measure(model: GPT) -> dict[str, float]:
        batches = by_length([len(ids) for ids, _ in heldout], 4096)
        nats = sum(float(answer_loss(model, [heldout[i] for i in batch], pad)[0]) for batch in batches)
        return {"loss": nats / sum(sum(said[1:]) for _, said in heldout)}

    # 3. Train.
    before, known = measure(model)["loss"], remembered(model, tokenize, tokenizer)
    if cfg.lora is not None:
        if os.environ.get("FORJA_ZERO", "0") != "0":
            raise ForjaError("FORJA_ZERO: adapters are not divided between ranks; leave it out, or set sft.lora=null")
        torch.manual_seed(cfg.seed)
        adapt(model, cfg.lora)
    model, last = fit(model, cfg, batch, loss, lambda item: sum(item[1][1:]), measure, scratch, log, keep=cfg.keep)
    if cfg.lora is not None:
        merge(model)

    # 4. Keep it, with a few held-out answers to look at.
    save(model, out, pretrain / TOKENIZER, prompts)
    items = question_items(tokenizer, table["val"][: cfg.sample_rows], prompts, context)
    write_samples(out, model.eval(), tokenizer, items, end)
    return last | {
        "val_loss": measure(model)["loss"],
        "val_loss_before": before,
        "text_bits_per_byte": remembered(model, tokenize, tokenizer),
        "text_bits_per_byte_before": known,
        "rows": float(len(train)),
        "dropped": float(sum(dropped.values())),
        **{f"dropped.{why}": float(n) for why, n in dropped.items()},
    }

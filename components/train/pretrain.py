"""Pretrain: next-token prediction on the packed corpus."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, ValidationInfo, field_validator
from tokenizers import Tokenizer
from torch import Tensor, nn

from components.artifact import ForjaError, to_json
from components.data.batches import windows
from components.data.chat import END, encode_text, special
from components.data.packing import Window, pack, packed
from components.log import Log
from components.model.checkpoint import default_device as device
from components.model.checkpoint import save
from components.model.gpt import GPT, GPTConfig, Shape, parameter_count
from components.model.interop import TEMPLATE, initial, own_template
from components.model.pipeline import stages
from components.model.segments import segments
from components.train.loop import Training, fit
from components.train.samples import write_samples
from components.train.zloss import nats_and_z


class Config(Training, frozen=True, extra="forbid"):
    model: Shape | None
    init: str | None  # a checkpoint to start from, of forja's or a Hugging Face folder: a path, or hf:org/name
    context: int | None = Field(ge=1)  # tokens of a window; None: as many as the model sees
    packing: Literal["stream", "bestfit"]  # one stream cut every `context` tokens, or documents kept apart (packing.py)
    z_loss: float = Field(ge=0)
    val_windows: int = Field(ge=1)
    samples: list[str]

    @field_validator("init")
    @classmethod
    def _one_or_the_other(cls, init: str | None, info: ValidationInfo) -> str | None:
        if "model" in info.data and (init is None) == (info.data["model"] is None):
            raise ValueError("and model: exactly one of the two is null; a model that is there has its own shape")
        return init


def window_loss(model: nn.Module, items: Sequence[np.ndarray], z: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """The summed cross-entropy in nats of windows [context + 1], plus the z-loss with coefficient `z`."""
    ids = torch.from_numpy(np.stack(items)).to(device())
    if z:
        return nats_and_z(model(ids[:, :-1]), ids[:, 1:], z)
    return model(ids[:, :-1], targets=ids[:, 1:]).sum(), {}


def packed_loss(model: nn.Module, items: Sequence[Window], z: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """The same of windows that hold documents side by side: each document is read as if it stood alone."""
    ids = torch.from_numpy(np.stack([window.ids for window in items])).to(device())
    targets = torch.from_numpy(np.stack([window.targets for window in items])).to(device())
    learnt = targets >= 0
    where = segments([window.lengths for window in items], ids.shape[1], device())
    if z:
        return nats_and_z(model(ids, mask=where, at=learnt), targets[learnt], z)
    return model(ids, mask=where, at=learnt, targets=targets[learnt]).sum(), {}


class Supply(NamedTuple):
    """A shard as batches of windows (seed, step, how many), what their loss is, and how many tokens one teaches."""

    batch: Callable[[int, int, int], Sequence[Any]]
    loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    count: Callable[[Any], int]
    waste: float  # the share of the windows that holds nothing


def supply(packing: str, shard: Path, context: int) -> Supply:
    if packing == "stream":
        return Supply(partial(windows, shard, context), window_loss, lambda window: len(window) - 1, 0.0)
    plan = pack(shard, context)
    return Supply(partial(packed, plan), packed_loss, lambda window: int((window.targets >= 0).sum()), plan.waste)


def run(cfg: Config, tokenize: Path, out: Path, scratch: Path, log: Log, init: Path | None = None) -> dict[str, float]:
    """`init` is where cfg.init lies, if it names one."""
    # 1. The model: the recipe's shape and the tokenizer's vocabulary, or one that is there.
    tokenizer = Tokenizer.from_file(str(tokenize / "tokenizer.json"))
    torch.manual_seed(cfg.seed)
    if cfg.model is not None:
        config = GPTConfig(**cfg.model.model_dump(), vocab_size=tokenizer.get_vocab_size(), head="lm")
        model = GPT(config).to(device())
    else:
        assert init is not None  # noqa: S101
        model = initial(init, tokenize / "tokenizer.json").to(device())
    context = cfg.context or model.config.context
    if context > model.config.context:
        raise ForjaError(f"pretrain.context: {context}, and the model sees {model.config.context}; choose at most that")
    staged = stages() > 1
    if staged and (cfg.packing != "stream" or cfg.z_loss):
        raise ForjaError(f"FORJA_PIPELINE={stages()}: needs packing=stream and z_loss=0; set them, or leave it out")

    # 2. What is learnt from, and what is held out: the same windows every time.
    train, val = (supply(cfg.packing, tokenize / f"{split}.npy", context) for split in ("train", "val"))
    heldout = val.batch(0, 0, cfg.val_windows)

    @torch.no_grad()
    def validate(model: GPT) -> dict[str, float]:
        nats = sum(float(val.loss(model, heldout[i : i + cfg.batch])[0]) for i in range(0, len(heldout), cfg.batch))
        return {"loss": nats / sum(map(val.count, heldout))}

    # 3. Train.
    model, last = fit(
        model,
        cfg,
        lambda step: train.batch(cfg.seed, step, cfg.batch),
        lambda model, items: train.loss(model, items, cfg.z_loss),
        train.count,
        validate,
        scratch,
        log,
        staged,
    )

    # 4. Keep it, with a few continuations to look at.
    save(model, out, tokenize / "tokenizer.json")
    if init is not None and (template := own_template(init)) is not None:
        (out / TEMPLATE).write_text(to_json(template), encoding="utf-8")
    asked = [{"prompt": t, "ids": encode_text(tokenizer, t)} for t in cfg.samples]
    write_samples(out, model, tokenizer, asked, special(tokenizer, END))
    tokens = json.loads((tokenize / "tokens.json").read_bytes())["train"]["tokens"]
    return last | {
        "val_loss": validate(model.eval())["loss"],
        "parameters": float(parameter_count(model)),
        "epochs": cfg.steps * cfg.batch * context * (1 - train.waste) / tokens,
        "waste": train.waste,
    }

"""Pretrain: next-token prediction on the packed corpus."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import Field, ValidationInfo, field_validator
from tokenizers import Tokenizer
from torch import Tensor, nn

from components.artifact import ForjaError
from components.data.batches import windows
from components.data.chat import encode_text
from components.log import Log
from components.model.checkpoint import default_device as device
from components.model.checkpoint import save
from components.model.gpt import GPT, GPTConfig, Shape, parameter_count
from components.model.interop import initial
from components.train.loop import Training, fit
from components.train.samples import write_samples
from components.train.zloss import nats_and_z


class Config(Training, frozen=True, extra="forbid"):
    model: Shape | None
    init: str | None  # a checkpoint to start from, of forja's or a Hugging Face folder: a path, or hf:org/name
    context: int | None = Field(ge=1)  # tokens of a window; None: as many as the model sees
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

    # 2. What is held out: the same windows every time.
    heldout = windows(tokenize / "val.npy", context, 0, 0, cfg.val_windows)

    @torch.no_grad()
    def validate(model: GPT) -> dict[str, float]:
        nats = sum(float(window_loss(model, heldout[i : i + cfg.batch])[0]) for i in range(0, len(heldout), cfg.batch))
        return {"loss": nats / (len(heldout) * context)}

    # 3. Train.
    model, last = fit(
        model,
        cfg,
        lambda step: windows(tokenize / "train.npy", context, cfg.seed, step, cfg.batch),
        lambda model, items: window_loss(model, items, cfg.z_loss),
        lambda window: len(window) - 1,
        validate,
        scratch,
        log,
    )

    # 4. Keep it, with a few continuations to look at.
    save(model, out, tokenize / "tokenizer.json")
    write_samples(out, model, tokenizer, [{"prompt": t, "ids": encode_text(tokenizer, t)} for t in cfg.samples])
    tokens = json.loads((tokenize / "tokens.json").read_bytes())["train"]["tokens"]
    return last | {
        "val_loss": validate(model.eval())["loss"],
        "parameters": float(parameter_count(model)),
        "epochs": cfg.steps * cfg.batch * context / tokens,
    }

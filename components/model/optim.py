"""What a recipe says of the optimiser: its rates, its schedule, and which weights it moves how."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import nn

from components.model.muon import Muon


class Optim(BaseModel, frozen=True, extra="forbid"):
    """The optimiser and its schedule.

    `matrix_lr` is Muon's rate for the blocks' matrices; with None AdamW moves them too. Weights and optimiser are in
    float32 always; with `bf16` the products are taken in bfloat16 (autocast). `ema` is the decay of an average of the
    weights over the steps (Polyak & Juditsky 1992); it is then the average that is kept.
    """

    lr: float = Field(gt=0)
    matrix_lr: float | None = Field(gt=0)
    schedule: Literal["wsd", "cosine"]
    lr_floor: float = Field(ge=0, le=1)  # what is left of the rate at the last step
    warmup: int = Field(ge=0)
    decay: float = Field(ge=0, le=1)  # wsd: the share of the steps over which the rate falls
    weight_decay: float = Field(ge=0)
    beta2: float = Field(gt=0, lt=1)
    clip: float = Field(gt=0)
    ema: float | None = Field(gt=0, lt=1)
    precision: Literal["fp32", "bf16"]


def schedule(optim: Optim, step: int, steps: int) -> float:
    """The part of the full rate at `step` (from 0) of `steps`, after a linear warmup.

    wsd: the full rate, and a linear decay over the last part (warmup, stable, decay; Hu et al. 2024, section 4).
    cosine: half a cosine from the end of the warmup to the last step (Loshchilov & Hutter 2017, eq. 5).
    """
    up = (step + 1) / optim.warmup if step < optim.warmup else 1.0
    if optim.schedule == "cosine":
        done = min(1.0, max(0, step - optim.warmup) / max(1, steps - optim.warmup))
        left = (1 + math.cos(math.pi * done)) / 2
    else:
        falling = optim.decay * steps
        left = (steps - step) / falling if falling > 0 else 1.0
    return min(up, optim.lr_floor + (1 - optim.lr_floor) * min(1.0, left))


def optimiser(named: Iterable[tuple[str, nn.Parameter]], optim: Optim) -> torch.optim.Optimizer:
    """Vectors (norms, biases) are not decayed: decay is a prior on matrices."""
    named = [(n, p) for n, p in named if p.requires_grad]
    vectors = {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0, "full": optim.lr}
    inner = [p for n, p in named if p.dim() > 1 and n.startswith("blocks.")]
    outer = [p for n, p in named if p.dim() > 1 and not n.startswith("blocks.")]  # embeddings, head
    if optim.matrix_lr is None:
        matrices = {"params": inner + outer, "weight_decay": optim.weight_decay, "full": optim.lr}
        groups = [g for g in (matrices, vectors) if g["params"]]
        return torch.optim.AdamW(groups, lr=optim.lr, betas=(0.9, optim.beta2), eps=1e-8, fused=True)
    embeddings = {"params": outer, "weight_decay": optim.weight_decay, "full": optim.lr}
    return Muon(inner, optim.matrix_lr, [embeddings, vectors], optim.beta2)

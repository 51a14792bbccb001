"""Low-rank adapters (Hu et al. 2022): the blocks' matrices stand still, and what is learnt beside each is small.

An adapter is a parametrization of its matrix: whoever reads `linear.weight`, the kernels and the generator included,
reads the sum. Merging it is keeping what is read.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Lora(BaseModel, frozen=True, extra="forbid"):
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)  # what is learnt counts alpha / rank times


class LowRank(nn.Module):
    """W + (alpha / rank) B A. B starts at zero, so that at first nothing is changed."""

    def __init__(self, weight: Tensor, lora: Lora) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.empty(lora.rank, columns, device=weight.device))
        self.b = nn.Parameter(torch.zeros(rows, lora.rank, device=weight.device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.scale, self.on = lora.alpha / lora.rank, True

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.b @ self.a) if self.on else weight


def adapt(model: Any, lora: Lora) -> None:
    """Put an adapter beside every matrix of the blocks; nothing else of the model moves from now on."""
    model.requires_grad_(False)
    for module in list(model.blocks.modules()):
        if isinstance(module, nn.Linear):
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, lora))


def merge(model: Any) -> None:
    """Make the sums the model's own weights; all of them may move again."""
    for module in list(model.blocks.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    model.requires_grad_(True)


@contextmanager
def without(model: Any) -> Iterator[None]:
    """Inside, the model is the one that was there before the adapters: a reference that takes no memory of its own."""
    adapters = [module for module in model.modules() if isinstance(module, LowRank)]
    before = [adapter.on for adapter in adapters]
    for adapter in adapters:
        adapter.on = False
    try:
        yield
    finally:
        for adapter, on in zip(adapters, before, strict=True):
            adapter.on = on

"""The weights of the step that did best on held-out rows: a training that goes on for too long loses nothing by it."""

import math
import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from components.artifact import ForjaError
from components.model.scratch import Piece, Shards
from components.world import world


class Best:
    """A copy of the weights in the host's memory, taken whenever the held-out loss is the lowest so far.

    It is part of every checkpoint, so that a resumed run keeps the same step.
    """

    def __init__(self, model: nn.Module) -> None:
        if os.environ.get("FORJA_ZERO") == "3":
            raise ForjaError("FORJA_ZERO=3: no rank holds the best step's weights whole; set keep=last, or ZeRO 2")
        self.model, self.loss, self.step = model, math.inf, 0
        self.weights: dict[str, Tensor] = {}

    def note(self, loss: float, step: int) -> None:
        if loss < self.loss:
            self.loss, self.step = loss, step
            self.weights = {n: p.detach().to("cpu", copy=True) for n, p in _moved(self.model)}

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the model the kept weights, if any step was noted."""
        for name, p in _moved(self.model):
            if name in self.weights:
                p.copy_(self.weights[name])

    def pieces(self) -> Iterator[Piece]:
        if self.weights and world()[0] == 0:
            yield Piece("noted", 0, torch.tensor([self.loss, self.step], dtype=torch.float64))
            for name, weight in self.weights.items():
                yield Piece(f"weight/{name}", 0, weight.view(-1))

    def restore(self, shards: Shards, name: str) -> None:
        if shards.size(f"{name}/noted"):
            loss, step = shards.read(f"{name}/noted", 0, 2).tolist()
            self.loss, self.step = loss, int(step)
            for key, p in _moved(self.model):
                self.weights[key] = shards.read(f"{name}/weight/{key}", 0, p.numel()).view(p.shape)


def _moved(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)

"""A model made ready to read rows whole: gpt.py's `hidden` and `logits` over weights that decode.py has laid out."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from components.model.attention import attend
from components.model.decode import Decoder, Layer
from components.model.gpt import GPT, KVCache
from components.model.parallel import divided


class _Rows(NamedTuple):
    positions: Tensor
    mask: Tensor | None
    cache: KVCache | None
    B: int
    T: int


class Reader(Decoder):
    """Two to three times as fast as the model itself where it is small, and without gradients.

    `positions`, `mask` and `cache` are those of GPT.hidden, with positions wherever rows do not begin at the cache's
    end. A window has to be in the mask where there is one.
    """

    def hidden(
        self,
        ids: Tensor,
        *,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        B, T = ids.shape
        start = 0 if cache is None else cache.filled
        at = torch.arange(start, start + T, device=ids.device) if positions is None else positions
        with self.guard():
            x, rope = self._embedded(ids, at, None if cache is None else cache.last)
            x = x.reshape(B * T, -1)
            rows: Any = _Rows(at, mask, cache, B, T)
            for number, layer in enumerate(self.layers):
                x = self._block(x, layer, number, rope, rows)
            if cache is not None:
                cache.filled += T
                cache.last = ids[:, -1:]
            return self.norm(x).view(B, T, -1)

    def _attention(self, x: Tensor, layer: Layer, number: int, rope: Tensor | None, span: Any) -> Tensor:
        q, k, v = self._heads(x, layer, rope, span.B, span.T)
        if span.cache is not None:
            k, v = span.cache.append(number, k, v, span.positions)
        y = attend(q, k, v, span.mask, self.config.window)
        return y.transpose(1, 2).reshape(span.B * span.T, -1)


def reader(model: GPT) -> GPT | Reader:
    """What reads fastest: a Reader of the model as it now is, or a model that is spread over devices itself."""
    return model if divided(model) else Reader(model)

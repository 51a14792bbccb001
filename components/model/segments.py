"""Several documents in one row: each sees itself alone, and counts its positions from 0.

No T x T mask is made. The documents are gathered into rows of their own, those of about one length together, so that
the kernels for plain causal attention serve; at most half of what they compute is padding's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from components.model.attention import attend


class Segments(NamedTuple):
    """Where the documents of rows [B, T] lie, in place of a mask: `model(ids, mask=segments(lengths, T))`."""

    positions: Tensor  # [B, T], from 0 in each document
    rows: tuple[Tensor, ...]  # [n, L]: the flat places of n documents' tokens, filled up by repeating the last
    back: Tensor  # [B * T]: where each place's result stands among those of all rows


def segments(lengths: Sequence[Sequence[int]], length: int, device: torch.device | str = "cpu") -> Segments:
    """For rows of `length` tokens that hold documents of `lengths`, from left to right and leaving nothing over.

    Raises ValueError where they do leave something over.
    """
    if bad := [row for row in lengths if sum(row) != length or min(row) < 1]:
        raise ValueError(f"documents of {list(bad[0])} tokens do not fill a row of {length}")
    sizes = torch.tensor([n for row in lengths for n in row])
    starts = sizes.cumsum(0) - sizes
    positions = torch.arange(int(sizes.sum())) - starts.repeat_interleave(sizes)
    order = sizes.argsort(descending=True, stable=True)
    rows, back, done = [], torch.empty_like(positions), 0
    while len(order):
        longest = int(sizes[order[0]])
        n = int((sizes[order] * 2 > longest).sum())
        within = torch.arange(longest)
        size, start = sizes[order[:n], None], starts[order[:n], None]
        rows.append(start + torch.minimum(within, size - 1))
        real = within < size
        back[rows[-1][real]] = done + real.flatten().nonzero().squeeze(1)
        done += n * longest
        order = order[n:]
    return Segments(positions.view(len(lengths), length).to(device), tuple(r.to(device) for r in rows), back.to(device))


def attend_each(q: Tensor, k: Tensor, v: Tensor, where: Segments, window: int | None = None) -> Tensor:
    """Causal attention [B, H, T, head] within each document of q [B, H, T, head] and k, v [B, kv_heads, T, head]."""
    B, H, T, head = q.shape
    flat = [x.transpose(1, 2).reshape(B * T, -1, head) for x in (q, k, v)]
    out = []
    for rows in where.rows:
        q, k, v = (x.index_select(0, rows.flatten()).view(*rows.shape, -1, head).transpose(1, 2) for x in flat)
        out.append(attend(q, k, v, window=window).transpose(1, 2).reshape(-1, H, head))
    return torch.cat(out).index_select(0, where.back).view(B, T, H, head).transpose(1, 2)

"""Causal attention through PyTorch's fused kernels: never T x T numbers in memory, whatever T is."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SHORT = 512  # positions up to which a T x T matrix is no worry
BLOCK = 128  # queries that short rows take at a time


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, window: int | None = None) -> Tensor:
    """softmax(q k^T / sqrt(head)) v as [B, H, T, head] of q [B, H, T, head] and k, v [B, kv_heads, S, head].

    mask: boolean, broadcast to [B, H, T, S], True where a query may look. Without one the T queries are the last of
    the S positions: each looks at itself and what is before it, at most `window` positions in all. T must be 1 or S.
    """
    B, H, T, head = q.shape
    groups, S = H // k.shape[1], k.shape[2]
    if mask is None and window is not None and window < S:
        if T > 1:
            return _windowed(q, k, v, window)
        k, v = k[:, :, -window:], v[:, :, -window:]
    if groups > 1 and T == 1:  # the heads that share keys become rows of one query: nothing is copied
        y = F.scaled_dot_product_attention(q.view(B, H // groups, groups, head), k, v, attn_mask=_shared(mask))
        return y.view(B, H, 1, head)
    if groups > 1 and q.device.type == "cpu":  # grouped heads would fall back to the kernel that holds T x S
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        groups = 1
    if mask is None and 1 < T <= SHORT and q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return _by_products(q, k, v)
    causal = mask is None and T > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=groups > 1)


def _shared(mask: Tensor | None) -> Tensor | None:
    """A mask of T = 1 for all heads alike: one a head would have to be regrouped as the queries are."""
    if mask is not None and mask.dim() == 4 and mask.shape[1] != 1:
        raise ValueError("a mask that differs by head does not fit grouped heads")
    return mask


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Blocks of `window` queries, each against the two blocks of keys that it can reach: memory T x window at most."""
    T = q.shape[2]
    parts = []
    for start in range(0, T, window):
        stop, first = min(T, start + window), max(0, start - window + 1)
        at = torch.arange(start, stop, device=q.device)[:, None]
        keys = torch.arange(first, stop, device=q.device)
        seen = (keys <= at) & (keys > at - window)
        parts.append(attend(q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], seen))
    return torch.cat(parts, dim=2)


def _by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Short rows in bfloat16 on a CPU by plain batched products: the fused kernel takes twice the time."""
    y: Tensor = _Short.apply(q, k, v.to(q.dtype))
    return y


class _Short(torch.autograd.Function):
    """Blocks of queries, each against the keys up to its end, so that less of what the mask hides is computed.

    The results lie in memory as [B, T, H, head], in which the layers around want them.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, H, T, head = q.shape
        y = q.new_empty(B, T, H, head).transpose(1, 2)
        q, k, v = (x.reshape(B * H, T, head) for x in (q * head**-0.5, k, v))
        hidden = q.new_full((BLOCK, BLOCK), -torch.inf).triu_(1)
        kept = []
        for start in range(0, T, BLOCK):
            stop = min(T, start + BLOCK)
            scores = torch.bmm(q[:, start:stop], k[:, :stop].mT)
            scores[:, :, start:] += hidden[: stop - start, : stop - start]
            p = torch.ops.aten._softmax(scores, -1, False)  # not by autocast's list, which would widen it
            y[:, :, start:stop] = torch.bmm(p, v[:, :stop]).view(B, H, stop - start, head)
            kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *kept = ctx.saved_tensors
        B, H, T, head = grad.shape
        dq, dk, dv = (q.new_empty(B, T, H, head).transpose(1, 2) for _ in range(3))
        many = T > BLOCK
        if many:  # what several blocks add up is added in float32
            sum_k, sum_v = (q.new_zeros(B * H, T, head, dtype=torch.float32) for _ in range(2))
        for i, p in enumerate(kept):
            start, stop = i * BLOCK, min(T, (i + 1) * BLOCK)
            dy = grad[:, :, start:stop].reshape(B * H, stop - start, head)
            dp = torch.bmm(dy, v[:, :stop].mT)
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, :, start:stop] = torch.bmm(ds, k[:, :stop]).mul_(head**-0.5).view(B, H, stop - start, head)
            part_k, part_v = torch.bmm(ds.mT, q[:, start:stop]), torch.bmm(p.mT, dy)
            if many:
                sum_k[:, :stop] += part_k
                sum_v[:, :stop] += part_v
        dk[:] = (sum_k if many else part_k).view(B, H, T, head)
        dv[:] = (sum_v if many else part_v).view(B, H, T, head)
        return dq, dk, dv

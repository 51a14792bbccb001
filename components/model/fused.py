"""Three spots where a training step on a CPU spends its time beside the matrix products, with their gradients by hand.

Each has a plain definition in PyTorch, which the tests hold it against. What is gained is passes over memory: numbers
are widened to float32 in pieces that stay in a core's cache, and what the way back needs is computed on the way there.
"""

import ctypes
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def piece() -> int:
    """Numbers that stay in the cores' caches, several times over."""
    return (1 << 16) * torch.get_num_threads()


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next step, instead of giving it back and zeroing fresh pages.

    A step of a 10M model on two cores takes an eighth less time. Only glibc knows these options; elsewhere nothing
    happens.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def gelu(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (Hendrycks & Gimpel 2016), as GPT-2 has it."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.is_grad_enabled() and x.requires_grad:
        y: Tensor = _Gelu.apply(x)
        return y
    return F.gelu(x, approximate="tanh")


class _Gelu(torch.autograd.Function):
    """x sigmoid(u) with u = a x + b x^3: the same function, because (1 + tanh(u / 2)) / 2 = sigmoid(u). PyTorch takes
    a slow tanh twice, there and back; here the derivative is computed beside the value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        a, b = 1.5957691216057308, 0.0713548162726009  # 2 sqrt(2 / pi), and that times 0.044715
        flat = x.reshape(-1)
        y, slope = torch.empty_like(flat), torch.empty_like(flat)
        for xs, ys, slopes in zip(*(x.split(piece()) for x in (flat, y, slope)), strict=True):
            wide = xs.float()
            square = wide * wide
            gate = (wide * a).addcmul_(wide, square, value=b).sigmoid_()
            value = wide.mul_(gate)
            ys.copy_(value)
            value.addcmul_(value, gate, value=-1)  # x s (1 - s)
            slopes.copy_(gate.addcmul_(value, square.mul_(3 * b).add_(a)))
        ctx.save_for_backward(slope.view_as(x))
        return y.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return grad * slope


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al. 2021)."""
    y: Tensor = _SquaredRelu.apply(x)
    return y


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.clamp_min(0)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return torch.mul(grad, positive).mul_(2)


def nats(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(hidden weight^T)[target], float32 [n], of hidden [n, width], weight [vocab, width], targets [n]."""
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        out: Tensor = _Nats.apply(hidden, weight, targets)
        return out
    rows = max(1, 32 * piece() // len(weight))
    return torch.cat(
        [_softmax(h @ weight.T, t, None) for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)]
    )


def _softmax(logits: Tensor, targets: Tensor, into: Tensor | None) -> Tensor:
    """The nats of `targets` under `logits` [n, vocab]; `into`, which may be the logits' own memory, gets softmax."""
    rows = max(1, piece() // logits.shape[1]) if logits.device.type == "cpu" else len(logits) or 1
    out = []
    for i in range(0, len(logits), rows):
        wide = logits[i : i + rows].float()
        picked = wide.gather(1, targets[i : i + rows, None])
        top = wide.amax(1, keepdim=True)
        p = torch.ops.aten._softmax(wide, -1, False)  # not by autocast's list, which would widen and narrow again
        # The largest p is at least 1 / vocab, so that its logarithm is exact where that of the target's would not be.
        out.append((top - p.amax(1, keepdim=True).log() - picked).squeeze(1))
        if into is not None:
            into[i : i + rows].copy_(p)
    return torch.cat(out) if out else logits.new_zeros(0, dtype=torch.float32)


class _Nats(torch.autograd.Function):
    """The logits' memory holds their gradient, softmax - onehot, from the way there on: nothing of [n, vocab] is made
    again, and nothing in float32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            grads = hidden @ weight.T
            out = _softmax(grads, targets, grads)
            grads.scatter_add_(1, targets[:, None], torch.full_like(grads[:, :1], -1))
        ctx.save_for_backward(hidden, weight, grads)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, grads = ctx.saved_tensors
        scale = grad[:, None].to(hidden.dtype)
        return (grads @ weight).mul_(scale), grads.T @ (hidden * scale), None

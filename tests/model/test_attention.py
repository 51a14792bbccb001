"""The fused kernels against attention taken block by block, with a running maximum and a running sum."""

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from components.model.attention import attend

Seen = Callable[[Tensor, Tensor], Tensor]  # query positions [n, 1], key positions [m] -> may look [n, m]


def blockwise(q: Tensor, k: Tensor, v: Tensor, seen: Seen, block: int) -> Tensor:
    """softmax(q k^T / sqrt(head)) v of q, k, v [..., T, head], never more than block x block scores at a time.

    Each query keeps the largest score so far, the sum of exp(score - largest), and the values weighted alike; a block
    with a larger maximum scales down what came before it. Only at the end is anything divided by a sum: blocks that
    were normalised one by one could not be added (Milakov & Gimelshein 2018; Dao et al. 2022, algorithm 1).
    """
    T, head = q.shape[-2:]
    out = torch.empty_like(q)
    for i in range(0, T, block):
        rows = torch.arange(i, min(T, i + block))[:, None]
        largest = torch.full((*q.shape[:-2], len(rows), 1), -torch.inf)
        total = torch.zeros_like(largest)
        weighted = torch.zeros(*q.shape[:-2], len(rows), head)
        for j in range(0, T, block):
            columns = torch.arange(j, min(T, j + block))
            scores = q[..., i : i + block, :] @ k[..., j : j + block, :].mT / math.sqrt(head)
            scores = scores.masked_fill(~seen(rows, columns), -torch.inf)
            new = torch.maximum(largest, scores.amax(-1, keepdim=True))
            safe = new.masked_fill(new == -torch.inf, 0.0)  # a row that has seen nothing yet
            shrink, p = (largest - safe).exp(), (scores - safe).exp()
            total = total * shrink + p.sum(-1, keepdim=True)
            weighted = weighted * shrink + p @ v[..., j : j + block, :]
            largest = new
        out[..., i : i + block, :] = weighted / total
    return out


def causal(rows: Tensor, columns: Tensor) -> Tensor:
    return columns <= rows


def within(window: int) -> Seen:
    return lambda rows, columns: (columns <= rows) & (columns > rows - window)


@pytest.mark.parametrize("T", [1, 7, 64, 130])
@pytest.mark.parametrize("block", [16, 128])
def test_causal_attention_is_the_blockwise_one(T: int, block: int) -> None:
    q, k, v = torch.randn(3, 2, 4, T, 16)
    torch.testing.assert_close(attend(q, k, v), blockwise(q, k, v, causal, block), atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [1, 5, 64, 200])
def test_windowed_attention_is_the_blockwise_one(window: int) -> None:
    q, k, v = torch.randn(3, 2, 4, 130, 16)
    got = attend(q, k, v, window=window)
    torch.testing.assert_close(got, blockwise(q, k, v, within(window), 32), atol=1e-5, rtol=0)
    newest = attend(q[:, :, -1:], k, v, window=window)  # one query behind a cache
    torch.testing.assert_close(newest, got[:, :, -1:], atol=1e-5, rtol=0)


def test_ragged_rows_attend_as_each_alone() -> None:
    """Rows of 5, 9 and 12 positions, padded: a mask by row is what each row gives by itself."""
    q, k, v = torch.randn(3, 3, 2, 12, 8)
    lengths = torch.tensor([5, 9, 12])
    at = torch.arange(12)
    mask = (at <= at[:, None]) & (at < lengths[:, None, None, None])
    got = attend(q, k, v, mask)
    for row, n in enumerate(lengths.tolist()):
        alone = blockwise(*(x[row : row + 1, :, :n] for x in (q, k, v)), causal, 4)
        torch.testing.assert_close(got[row : row + 1, :, :n], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_grouped_heads_attend_as_copied_keys(T: int, masked: bool) -> None:
    q, (k, v) = torch.randn(2, 6, T, 8), torch.randn(2, 2, 2, 40, 8)
    mask = (torch.arange(40) <= torch.arange(40 - T, 40)[:, None])[None, None] if masked else None
    copied = [x.repeat_interleave(3, dim=1) for x in (k, v)]
    want = F.scaled_dot_product_attention(q, *copied, attn_mask=mask, is_causal=mask is None and T > 1)
    torch.testing.assert_close(attend(q, k, v, mask), want, atol=1e-5, rtol=1e-5)


def test_short_rows_in_bf16_attend_as_the_fused_kernel_does() -> None:
    q, k, v = torch.randn(3, 2, 4, 48, 16).bfloat16()
    want = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    assert (attend(q, k, v).float() - want).abs().max() < 0.03  # bfloat16 keeps eight bits


PEAK = """
import resource, sys, torch
from components.model.attention import attend
T, window, grad = int(sys.argv[1]), int(sys.argv[2]) or None, sys.argv[3] == "grad"
q, k, v = (torch.randn(1, heads, T, 32).requires_grad_(grad) for heads in (2, 1, 1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y = attend(q, k, v, window=window)
if grad:
    y.sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(("window", "grad"), [(0, "no"), (0, "grad"), (1024, "no")])
def test_memory_grows_with_the_length_and_not_with_its_square(window: int, grad: str) -> None:
    """Peak memory of a forward pass (and a backward one) in a process of its own, to 32,768 positions, grouped heads.

    A T x T matrix of one head would be 4 GB there.
    """

    def peak(T: int) -> float:
        command = [sys.executable, "-c", PEAK, str(T), str(window), grad]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024

    lengths = (8192, 32768) if grad == "no" else (4096, 16384)
    short, long = (peak(T) for T in lengths)
    assert long < 4 * 1.5 * short + 30, f"{short:.0f} MB at {lengths[0]} positions, {long:.0f} MB at {lengths[1]}"

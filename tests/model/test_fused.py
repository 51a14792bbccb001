"""The gradients written by hand against PyTorch's own in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from components.model.attention import BLOCK, attend
from components.model.fused import gelu, nats, piece
from components.model.gpt import GPT, GPTConfig


def far(got: Tensor, want: Tensor) -> float:
    """The error as a share of what there is."""
    return float((got.double() - want).norm() / want.norm())


def test_gelu_and_its_slope() -> None:
    x = torch.cat((torch.linspace(-12, 12, piece()), torch.randn(piece() // 2))).bfloat16().requires_grad_()
    exact = x.detach().double().requires_grad_()
    grad = torch.randn(x.shape)
    y, want = gelu(x), F.gelu(exact, approximate="tanh")
    y.backward(grad.bfloat16())
    want.backward(grad.double())
    assert type(y.grad_fn).__name__ == "_GeluBackward"
    assert float((y.double() - want).detach().abs().max()) < 12 * 2**-8 and far(y.detach(), want.detach()) < 2**-8
    assert x.grad is not None and exact.grad is not None
    assert float((x.grad.double() - exact.grad).abs().max()) < 4 * 2**-7 and far(x.grad, exact.grad) < 2**-7


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_nats_and_their_gradients_each_weighted(dtype: torch.dtype, share: float) -> None:
    vocab, n = 700, 300  # several pieces, the last one ragged
    hidden, weight = torch.randn(n, 24).to(dtype).requires_grad_(), torch.randn(vocab, 24).to(dtype).requires_grad_()
    targets, scale = torch.randint(vocab, (n,)), torch.randn(n)
    exact_h, exact_w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    got = nats(hidden, weight, targets)
    want = F.cross_entropy(exact_h @ exact_w.T, targets, reduction="none")
    assert got.dtype == torch.float32 and far(got.detach(), want.detach()) < share
    (got * scale).sum().backward()
    (want * scale).sum().backward()
    for a, b in ((hidden, exact_h), (weight, exact_w)):
        assert a.grad is not None and b.grad is not None and far(a.grad, b.grad) < 2 * share
    with torch.no_grad():
        torch.testing.assert_close(nats(hidden, weight, targets), got.detach())


def test_nats_of_the_nearly_impossible_and_of_nothing() -> None:
    """A target at 200 nats: its probability is 0 in float32, its logarithm is not."""
    weight = torch.tensor([[200.0], [0.0]], requires_grad=True)
    got = nats(torch.ones(1, 1), weight, torch.tensor([1]))
    assert float(got.detach()) == pytest.approx(200.0)
    assert nats(torch.ones(0, 1), weight, torch.tensor([], dtype=torch.long)).shape == (0,)


@pytest.mark.parametrize("T", [7, BLOCK, 2 * BLOCK + 44])
def test_short_rows_and_their_gradients(T: int) -> None:
    q, k, v, grad = (torch.randn(2, 3, T, 8).bfloat16() for _ in range(4))
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    y = attend(*inputs)
    want = F.scaled_dot_product_attention(*exact, is_causal=True)
    y.backward(grad)
    want.backward(grad.double())
    assert far(y.detach(), want.detach()) < 2**-7
    for a, b in zip(inputs, exact, strict=True):
        assert a.grad is not None and b.grad is not None and far(a.grad, b.grad) < 2**-6


@pytest.mark.parametrize("cap", [None, 5.0])
def test_the_models_nats_are_those_of_its_logits(tiny: GPTConfig, cap: float | None) -> None:
    model = GPT(tiny.model_copy(update={"logit_cap": cap}))
    ids = torch.randint(0, 40, (3, 12))
    at = torch.rand(3, 11) < 0.5
    want = F.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:], reduction="none")
    torch.testing.assert_close(model(ids[:, :-1], targets=ids[:, 1:]), want)
    torch.testing.assert_close(model(ids[:, :-1], at=at, targets=ids[:, 1:][at]), want[at])


def test_bf16_learns_as_float32_does(tiny: GPTConfig) -> None:
    """Twenty steps of AdamW under autocast, with all of the above on the way, and without."""

    def losses(bf16: bool) -> list[float]:
        torch.manual_seed(0)
        model = GPT(tiny)
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
        ids = torch.randint(0, 40, (8, 17), generator=torch.Generator().manual_seed(1))
        out = []
        for _ in range(20):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(ids[:, :-1], targets=ids[:, 1:]).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            out.append(float(loss.detach()))
        return out

    wide, narrow = losses(False), losses(True)
    assert wide[-1] < wide[0] - 0.3  # it learns
    assert narrow == pytest.approx(wide, abs=0.02)
    assert narrow == losses(True)  # to the bit

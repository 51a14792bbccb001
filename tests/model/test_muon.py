"""Muon's two halves: AdamW against torch's own, and orthogonal updates against the singular value decomposition."""

import pytest
import torch
from torch import nn

from components.model.muon import Muon, orthogonalise


def test_orthogonalise_keeps_the_directions_and_levels_the_values() -> None:
    torch.manual_seed(0)
    g = torch.randn(3, 8, 20)
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    for wide, exact in ((g, u @ vh), (g.mT, (u @ vh).mT)):
        x = orthogonalise(wide)
        assert x.shape == wide.shape
        values = torch.linalg.svdvals(x)
        assert values.min() > 0.6 and values.max() < 1.3
        assert torch.cosine_similarity(x.flatten(1), exact.flatten(1)).min() > 0.97


def test_the_others_move_as_by_torchs_adamw() -> None:
    torch.manual_seed(0)
    start = torch.randn(5, 3)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = Muon([], 0.1, [{"params": [ours], "weight_decay": 0.1, "full": 0.01}], 0.95)
    b = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for _ in range(5):
        grad = torch.randn(5, 3)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_a_matrix_moves_by_its_rate_whatever_the_gradients_size() -> None:
    torch.manual_seed(0)
    moved = []
    for size in (1e-3, 1e3):
        p = nn.Parameter(torch.zeros(6, 6))
        p.grad = size * torch.eye(6)
        Muon([p], 0.1, [], 0.95).step()
        moved.append(p.detach().diagonal().clone())
    torch.testing.assert_close(moved[0], moved[1])
    assert (-moved[0] > 0.06).all() and (-moved[0] < 0.13).all()


def test_momentum_grows_over_the_first_steps() -> None:
    """0.95 less a tenth of what is left of 300 steps: 0.85 + 0.1 * n / 300 at step n."""
    p = nn.Parameter(torch.zeros(2, 2))
    muon, want = Muon([p], 0.1, [], 0.95), torch.zeros(2, 2)
    for n in (1, 2, 3):
        p.grad = torch.randn(2, 2)
        mu = 0.85 + 0.1 * n / 300
        want = mu * want + (1 - mu) * p.grad
        muon.step()
        torch.testing.assert_close(muon.state[p]["momentum"], want)
    muon.state[p]["step"].fill_(1000)
    p.grad = torch.ones(2, 2)
    muon.step()
    torch.testing.assert_close(muon.state[p]["momentum"], 0.95 * want + 0.05)


def test_a_tall_matrix_moves_as_the_wide_one_on_its_side() -> None:
    """In one stack with a third; the tall one has a rate larger by sqrt(rows / columns)."""
    torch.manual_seed(0)
    grad = torch.randn(4, 16)
    wide, tall, other = (nn.Parameter(torch.zeros(shape)) for shape in ((4, 16), (16, 4), (4, 16)))
    wide.grad, tall.grad, other.grad = grad.clone(), grad.T.clone(), 100 * torch.randn(4, 16)
    Muon([wide, tall, other], 0.1, [], 0.95).step()
    torch.testing.assert_close(tall.detach().T, 2 * wide.detach())
    assert float(wide.detach().norm()) == pytest.approx(0.1 * 2, rel=0.2)  # of four directions, each 0.1 long

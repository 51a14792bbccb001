"""The z-loss against numbers worked out by hand, and against a slow loop in float64."""

import math

import pytest
import torch

from components.train.zloss import nats_and_z


def test_by_hand() -> None:
    """Logits whose exponentials are 1, 2, 5 and 1, 1, 2: Z is 8 and 4, the targets' shares 5/8 and 1/4."""
    logits = torch.tensor([[1.0, 2.0, 5.0], [1.0, 1.0, 2.0]]).log()
    loss, parts = nats_and_z(logits, torch.tensor([2, 0]), 0.1)
    assert float(parts["nats"]) == pytest.approx(math.log(8 / 5) + math.log(4))  # 1.8563
    assert float(parts["z_loss"]) == pytest.approx(0.1 * (math.log(8) ** 2 + math.log(4) ** 2))  # 0.6246
    assert float(loss) == pytest.approx(1.8563 + 0.6246, abs=1e-4)


def test_it_pulls_z_to_one_and_leaves_the_shares() -> None:
    """The gradient of c log^2 Z is 2 c log Z p, on top of the cross-entropy's p - onehot."""
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log().requires_grad_()
    nats_and_z(logits, torch.tensor([2]), 0.1)[0].backward()
    p = torch.tensor([[1 / 8, 2 / 8, 5 / 8]])
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, p * (1 + 0.2 * math.log(8)) - torch.tensor([[0.0, 0.0, 1.0]]))
    shifted = torch.tensor([[1.0, 2.0, 5.0]]).log() - math.log(8)  # Z = 1: nothing to hold
    assert float(nats_and_z(shifted, torch.tensor([2]), 0.1)[1]["z_loss"]) == pytest.approx(0, abs=1e-12)


def test_against_a_slow_loop() -> None:
    torch.manual_seed(0)
    logits, targets = 5 * torch.randn(3, 4, 11), torch.randint(0, 11, (3, 4))
    nats = z = 0.0
    for row, wanted in zip(logits.double().flatten(0, 1).tolist(), targets.flatten().tolist(), strict=True):
        log_z = math.log(sum(math.exp(x) for x in row))
        nats += log_z - row[wanted]
        z += 1e-4 * log_z**2
    loss, parts = nats_and_z(logits, targets, 1e-4)
    assert float(parts["nats"]) == pytest.approx(nats, rel=1e-5)
    assert float(parts["z_loss"]) == pytest.approx(z, rel=1e-5)
    assert float(loss) == pytest.approx(nats + z, rel=1e-5)

"""PPO's arithmetic against hand numbers and slow loops, and its behaviour on a task whose answer is known."""

import math

import pytest
import torch

from components.train.rl import gae, next_kl_coef, policy_loss, token_rewards, value_loss, whiten


def slow_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The definition: A_t = sum over l of (gamma lam)^l delta_{t+l}."""
    n = len(rewards)
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


def test_gae_against_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(3, 9, generator=generator), torch.randn(3, 9, generator=generator)
    spans = [(2, 7), (0, 9), (5, 6)]  # where each row's answer stands
    mask = torch.tensor([[a <= t < b for t in range(9)] for a, b in spans])
    got = gae(rewards * mask, values, mask, 0.97, 0.9)
    for row, (a, b) in enumerate(spans):
        want = slow_gae(rewards[row, a:b].tolist(), values[row, a:b].tolist(), 0.97, 0.9)
        assert got[row, a:b].tolist() == pytest.approx(want, abs=1e-5)
        assert not got[row, :a].any() and not got[row, b:].any()


def test_gae_by_hand() -> None:
    """gamma = lam = 1: the advantage is what is still to come minus the value. Rewards 0, 0, 1; values .5 each."""
    advantages = gae(torch.tensor([[0.0, 0.0, 1.0]]), torch.full((1, 3), 0.5), torch.ones(1, 3).bool(), 1.0, 1.0)
    assert advantages.tolist() == [[0.5, 0.5, 0.5]]


def test_rewards_by_hand() -> None:
    """A penalty of 0.1 a nat at each answer token, the score at the last of them, nothing elsewhere."""
    mask = torch.tensor([[False, True, True, False]])
    logprobs, reference = torch.tensor([[-9.0, -1.0, -2.0, -9.0]]), torch.tensor([[-1.0, -2.0, -1.0, -1.0]])
    got = token_rewards(torch.tensor([3.0]), logprobs - reference, mask, 0.1)
    assert got[0].tolist() == pytest.approx([0.0, -0.1, 3.1, 0.0])


def test_whitening_by_hand() -> None:
    """1, 2, 3 have mean 2 and deviation sqrt(2/3); what is not valid stays 0 and does not count."""
    got = whiten(torch.tensor([[1.0, 2.0], [3.0, 99.0]]), torch.tensor([[True, True], [True, False]]))
    root = math.sqrt(1.5)
    assert got.flatten().tolist() == pytest.approx([-root, 0.0, root, 0.0], abs=1e-6)
    assert whiten(torch.tensor([[5.0, 5.0]]), torch.ones(1, 2).bool()).tolist() == [[0.0, 0.0]]


def test_clipped_ratio_by_hand() -> None:
    """Ratio 1.5 with A = 1 counts 1.2; with A = -1 the worse, 1.5, stands; ratio 0.5 with A = -1 counts -(-0.8)."""
    new = torch.log(torch.tensor([[1.5, 1.5, 0.5, 1.1, 7.0]]))
    advantages = torch.tensor([[1.0, -1.0, -1.0, 2.0, 1.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    loss, clipped = policy_loss(new, torch.zeros(1, 5), advantages, mask, 0.2)
    assert float(loss) == pytest.approx(-1.2 + 1.5 + 0.8 - 2.2, abs=1e-6)
    assert int(clipped) == 3


def test_the_first_look_has_ratio_one() -> None:
    logprobs = torch.randn(2, 6)
    advantages, mask = torch.randn(2, 6), torch.ones(2, 6).bool()
    loss, clipped = policy_loss(logprobs, logprobs.clone(), advantages, mask, 0.2)
    assert int(clipped) == 0 and float(loss) == pytest.approx(-float(advantages.sum()), abs=1e-5)


def test_clipped_value_by_hand() -> None:
    """Old 0, new 1, return 2, clip 0.5: (1-2)^2 = 1 against (0.5-2)^2 = 2.25, the worse counts, halved."""
    one = lambda x: torch.tensor([[x]])  # noqa: E731
    mask = torch.ones(1, 1).bool()
    assert float(value_loss(one(1.0), one(0.0), one(2.0), mask, 0.5)) == pytest.approx(1.125)
    assert float(value_loss(one(0.25), one(0.0), one(2.0), mask, 0.5)) == pytest.approx(0.5 * 1.75**2)


def test_adaptive_kl_by_hand() -> None:
    assert next_kl_coef(0.1, 12.0, 6.0) == pytest.approx(0.102)  # twice the target: the error is held at 0.2
    assert next_kl_coef(0.1, 5.4, 6.0) == pytest.approx(0.099)
    assert next_kl_coef(0.1, 99.0, None) == 0.1

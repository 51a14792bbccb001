"""PPO's arithmetic against hand numbers, slow loops, and expectations taken over every outcome."""

import math

import pytest
import torch

from components.train.rl import (
    Estimator,
    explained_variance,
    gae,
    group_advantages,
    kl_estimate,
    next_kl_coef,
    policy_loss,
    repetition,
    token_rewards,
    value_loss,
    whiten,
)

REFERENCE = torch.tensor([0.5, 0.3, 0.15, 0.05])


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


def test_a_groups_advantages_against_a_slow_loop() -> None:
    """In whatever order the answers of the groups stand."""
    generator = torch.Generator().manual_seed(1)
    groups = torch.arange(5).repeat(4)[torch.randperm(20, generator=generator)]
    scores = torch.randn(20, generator=generator)
    scores[groups == 3] = 0.1  # a number that float32 does not hold
    got, alike = group_advantages(scores, groups)
    for i in range(20):
        among = [float(scores[j]) for j in range(20) if groups[j] == groups[i]]
        mean = sum(among) / len(among)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in among) / len(among))
        want = 0.0 if groups[i] == 3 else (float(scores[i]) - mean) / deviation
        assert float(got[i]) == pytest.approx(want, abs=1e-5)
    assert alike == pytest.approx(0.2)
    assert not got[groups == 3].any()


def test_group_advantages_by_hand() -> None:
    """Right, wrong, wrong, right: mean 1/2, deviation 1/2."""
    got, alike = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.zeros(4).long())
    assert got.tolist() == [1.0, -1.0, -1.0, 1.0] and alike == 0
    same, alike = group_advantages(torch.full((6,), -7.3), torch.tensor([0, 1, 0, 1, 0, 1]))
    assert same.tolist() == [0.0] * 6 and alike == 1


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


def test_kl_estimators_by_hand() -> None:
    """d = log 2: k1 = 0.6931, k2 = 0.2402, k3 = 1/2 - 1 + log 2; d = -log 2: k1 < 0, k3 = 2 - 1 - log 2."""
    new, old = torch.log(torch.tensor([[0.5, 0.25]])), torch.log(torch.tensor([[0.25, 0.5]]))
    log2 = math.log(2)
    assert kl_estimate(new, old, "k1")[0].tolist() == pytest.approx([log2, -log2])
    assert kl_estimate(new, old, "k2")[0].tolist() == pytest.approx([log2**2 / 2] * 2)
    assert kl_estimate(new, old, "k3")[0].tolist() == pytest.approx([log2 - 0.5, 1 - log2])
    far = kl_estimate(torch.tensor([-500.0]), torch.tensor([0.0]), "k3")
    assert torch.isfinite(far).all()


def expected(estimator: Estimator, logits: torch.Tensor) -> tuple[float, torch.Tensor]:
    """E[k] over all four outcomes, and E[k grad log pi]: what a penalty in the reward does to the policy."""
    logits = logits.clone().requires_grad_()
    logprobs = torch.log_softmax(logits, -1)
    k = kl_estimate(logprobs, REFERENCE.log(), estimator).detach()
    weight = logprobs.exp().detach() * k
    (gradient,) = torch.autograd.grad((weight * logprobs).sum(), logits)
    return float(weight.sum()), gradient


def test_kl_estimators_in_expectation() -> None:
    """k1 and k3 have the divergence as their mean; k1 alone has its gradient; k3's is that of KL - reversed KL."""
    logits = torch.tensor([0.4, 0.1, -0.3, 0.6], requires_grad=True)
    policy = torch.softmax(logits, -1)
    kl = (policy * (policy / REFERENCE).log()).sum()
    reverse = (REFERENCE * (REFERENCE / policy).log()).sum()
    (want,) = torch.autograd.grad(kl, logits, retain_graph=True)
    (other,) = torch.autograd.grad(kl - reverse, logits)
    means = {name: expected(name, logits.detach()) for name in ("k1", "k2", "k3")}  # type: ignore[arg-type]
    assert means["k1"][0] == pytest.approx(float(kl.detach()), abs=1e-6)
    assert means["k3"][0] == pytest.approx(float(kl.detach()), abs=1e-6)
    assert abs(means["k2"][0] - float(kl.detach())) > 0.01
    torch.testing.assert_close(means["k1"][1], want)
    torch.testing.assert_close(means["k3"][1], other)
    assert (means["k2"][1] - want).abs().max() > 0.05
    near = expected("k3", REFERENCE.log() + torch.tensor([0.02, 0.0, 0.0, 0.0]))[1]
    assert (
        near.abs().max() < 0.02 * expected("k1", REFERENCE.log() + torch.tensor([0.02, 0.0, 0.0, 0.0]))[1].abs().max()
    )


def test_losses_against_a_loop_over_tokens() -> None:
    generator = torch.Generator().manual_seed(1)
    new, old, a, b, c = (torch.randn(3, 7, generator=generator) for _ in range(5))
    mask = torch.tensor([[u <= t < v for t in range(7)] for u, v in ((0, 7), (2, 5), (6, 7))])
    wanted, clipped, worth = 0.0, 0, 0.0
    for i, t in mask.nonzero().tolist():
        ratio = math.exp(float(new[i, t] - old[i, t]))
        held = min(max(ratio, 0.8), 1.2)
        wanted += -min(ratio * float(a[i, t]), held * float(a[i, t]))
        clipped += ratio != held
        near = float(old[i, t]) + min(max(float(b[i, t] - old[i, t]), -0.3), 0.3)
        worth += 0.5 * max((float(b[i, t]) - float(c[i, t])) ** 2, (near - float(c[i, t])) ** 2)
    loss, count = policy_loss(new, old, a, mask, 0.2)
    assert (float(loss), int(count)) == (pytest.approx(wanted, abs=1e-4), clipped)
    assert float(value_loss(b, old, c, mask, 0.3)) == pytest.approx(worth, rel=1e-5)


def test_the_sketchs_formula_where_it_is_right() -> None:
    """One token, reward 1, penalty 0.1 a nat, log pi -1, log ref -1.5, value 0.45, a ratio of 1.5 clipped at 1.2:
    adjusted reward 1 - 0.05 = 0.95, advantage 0.5, policy loss -0.6, half the squared error 0.125, together -0.475.
    """
    one, mask = lambda x: torch.tensor([[x]]), torch.ones(1, 1).bool()
    old, value = one(-1.0), one(0.45)
    rewards = token_rewards(torch.tensor([1.0]), kl_estimate(old, one(-1.5), "k1"), mask, 0.1)
    advantages = gae(rewards, value, mask, 1.0, 0.95)
    assert (float(rewards), float(advantages)) == (pytest.approx(0.95), pytest.approx(0.5))
    policy, _ = policy_loss(old + math.log(1.5), old, advantages, mask, 0.2)
    assert float(policy + value_loss(value, value, advantages + value, mask, 0.2)) == pytest.approx(-0.475)


@pytest.mark.parametrize(("estimator", "pulls"), [("k1", "nothing"), ("k2", "KL(pi, ref)"), ("k3", "KL(ref, pi)")])
def test_what_an_estimator_pulls_to_as_a_loss(estimator: Estimator, pulls: str) -> None:
    """GRPO's penalty has its gradient through pi alone; expectations over every outcome of a softmax of four."""
    logits = torch.tensor([0.3, -0.2, 0.1, 0.4], requires_grad=True)
    logprobs, known = torch.log_softmax(logits, 0), REFERENCE.log()
    (got,) = torch.autograd.grad((logprobs.exp().detach() * kl_estimate(logprobs, known, estimator)).sum(), logits)
    logprobs = torch.log_softmax(logits, 0)
    divergences = {
        "nothing": 0 * logprobs.sum(),
        "KL(pi, ref)": (logprobs.exp() * (logprobs - known)).sum(),
        "KL(ref, pi)": (REFERENCE * (known - logprobs)).sum(),
    }
    (want,) = torch.autograd.grad(divergences[pulls], logits)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_the_sketchs_ratio_of_whole_answers_hides_its_tokens() -> None:
    """Ratios 4 and 0.25 are 1 together, and nothing would be clipped; token by token both are."""
    new, mask = torch.log(torch.tensor([[4.0, 0.25]])), torch.ones(1, 2).bool()
    whole, none = policy_loss(new.sum(1, keepdim=True), torch.zeros(1, 1), torch.ones(1, 1), mask[:, :1], 0.2)
    each, both = policy_loss(new, torch.zeros(1, 2), torch.ones(1, 2), mask, 0.2)
    assert (float(whole), int(none)) == (pytest.approx(-1.0), 0)
    assert (float(each), int(both)) == (pytest.approx(-1.2 - 0.25), 2)


def test_the_sketchs_value_settles_one_below_the_return() -> None:
    """With a gradient through the baseline, -(R - V) + (V - R)^2 / 2 is least at V = R - 1, whatever R is."""
    value = torch.tensor([[2.0]], requires_grad=True)  # R = 3
    mask = torch.ones(1, 1).bool()
    baseline, _ = policy_loss(torch.zeros(1, 1), torch.zeros(1, 1), 3.0 - value, mask, 0.2)
    (pull,) = torch.autograd.grad(baseline + value_loss(value, value.detach(), torch.tensor([[3.0]]), mask, 9.0), value)
    assert float(pull) == 0.0
    (right,) = torch.autograd.grad(value_loss(value, value.detach(), torch.tensor([[3.0]]), mask, 9.0), value)
    assert float(right) == -1.0  # up, to 3


def test_explained_variance_by_hand() -> None:
    """Returns 1, 3: variance 1. Values 1, 2: errors 0, 1, variance 1/4. A constant explains nothing."""
    returns, mask = torch.tensor([[1.0, 3.0, 50.0]]), torch.tensor([[True, True, False]])
    assert explained_variance(torch.tensor([[1.0, 2.0, 0.0]]), returns, mask) == pytest.approx(0.75)
    assert explained_variance(torch.tensor([[7.0, 7.0, 0.0]]), returns, mask) == pytest.approx(0.0)
    assert math.isfinite(explained_variance(torch.ones(1, 3), torch.ones(1, 3), mask))


def test_repetition_by_hand() -> None:
    """1 2 3 1 2 3 has four 3-grams, the last for the second time; 7 7 7 7 7 has three, two of them again."""
    assert repetition([[1, 2, 3, 1, 2, 3]]) == 0.25
    assert repetition([[7] * 5, [1, 2, 3, 4, 5]]) == pytest.approx(1 / 3)
    assert repetition([[1], [1, 2], []]) == 0.0

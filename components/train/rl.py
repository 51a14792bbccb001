"""The arithmetic of learning from a reward, as free functions on tensors; each says its equation.

Position t of [N, T] is one token of an answer; `mask` is True where there is one, a contiguous run in every row.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
LARGEST = 20.0  # nats by which one token may be likelier under the reference, in k3's exponential


def kl_estimate(logprobs: Tensor, reference: Tensor, estimator: Estimator) -> Tensor:
    """An estimate of KL(pi, ref) at each token, which pi sampled; with d = log pi - log ref (Schulman 2020):

    k1 = d, unbiased, and what a penalty in the reward has to be: its policy gradient is the divergence's own.
    k2 = d^2 / 2, biased, never negative. k3 = exp(-d) - 1 + d, unbiased, never negative, with less variance; but in
    a reward its policy gradient is that of KL(pi, ref) - KL(ref, pi), nearly nothing close to the reference.
    """
    d = logprobs - reference
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d**2
    return torch.expm1((-d).clamp(max=LARGEST)) + d


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = -kl_coef kl_t, plus the answer's score at its last token (Ziegler et al. 2019, eq. 2). [N, T]; scores [N].

    So the expectation of the penalty is taken as that of the score is: over what the policy samples.
    """
    rewards = -kl_coef * kl * mask
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    return rewards.scatter_add(1, last[:, None], scores[:, None])


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Advantages [N, T]: A_t = d_t + gamma lam A_{t+1}, d_t = r_t + gamma V_{t+1} - V_t (Schulman et al. 2016, eq. 16).

    Behind an answer's end there is no value and no advantage.
    """
    advantages = torch.zeros_like(rewards)
    after = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        after = torch.where(mask[:, t], delta + gamma * lam * after, torch.zeros_like(after))
        next_value = torch.where(mask[:, t], values[:, t], torch.zeros_like(after))
        advantages[:, t] = after
    return advantages


def group_advantages(scores: Tensor, groups: Tensor) -> tuple[Tensor, float]:
    """(S - mean) / deviation of each score [N] among those of its group, which are equally many (Shao et al. 2024,
    section 4.1.2). Where all of a group are equal, each is 0: none of them says what is better. And the share of these.
    """
    order = groups.argsort(stable=True)
    each = scores[order].view(int(groups.unique().numel()), -1)
    centred = each - each.mean(1, keepdim=True)
    alike = each.amax(1, keepdim=True) == each.amin(1, keepdim=True)
    out = centred / each.std(1, correction=0, keepdim=True).clamp(min=1e-8)
    out = torch.empty_like(scores).index_copy(0, order, out.masked_fill(alike, 0.0).flatten())
    return out, float(alike.float().mean())


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x with mean 0 and deviation 1 over the valid entries, 0 elsewhere. One entry, or all equal, gives zeros."""
    valid = x[mask]
    return (x - valid.mean()) / valid.std(correction=0).clamp(min=1e-8) * mask


def policy_loss(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """The sum over valid tokens of -min(rho A, clip(rho, 1 +- clip) A), rho = exp(new - old), and the clipped count
    (Schulman et al. 2017, eq. 7)."""
    ratio = torch.exp((new - old) * mask)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    return (loss * mask).sum(), ((ratio != clipped) & mask).sum()


def value_loss(new: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """The sum over valid tokens of max((V - R)^2, (clip(V, V_old +- clip) - R)^2) / 2."""
    clipped = old + (new - old).clamp(-clip, clip)
    return (0.5 * torch.maximum((new - returns) ** 2, (clipped - returns) ** 2) * mask).sum()


def next_kl_coef(coef: float, kl: float, target: float | None) -> float:
    """The adaptive coefficient of Ziegler et al. 2019, section 2.2: up when the divergence is above target."""
    if target is None:
        return coef
    return coef * (1 + 0.1 * min(max(kl / target - 1, -0.2), 0.2))


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(R - V) / Var(R) over valid tokens: 1 where the value model knows every return, 0 where it knows none."""
    variance = returns[mask].var(correction=0).clamp(min=1e-8)
    error = (returns - values)[mask].var(correction=0)
    return float(1 - error / variance)


def repetition(answers: Sequence[Sequence[int]], n: int = 3) -> float:
    """The share of an answer's n-grams that stood in it before, averaged over the answers. Short ones have none."""
    shares = []
    for ids in answers:
        grams = list(zip(*(ids[i:] for i in range(n)), strict=False))
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares)

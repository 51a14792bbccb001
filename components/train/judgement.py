"""How far a reward model's verdicts can be trusted: how often they are right and how sure that is, whether they are as
sure as they should be, and what a rule that looks at lengths alone would reach.

A lead is by how much the better answer's score is above the worse one's: over 0 it is right, at 0 it says no more than
a coin, and sigmoid(lead) is the probability that it gave the better one.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from components.stats import Interval, wilson

BINS, FEWEST = 10, 8  # of the calibration curve, and the verdicts that one of them holds at least


class Bin(NamedTuple):
    """Verdicts of about one confidence: its mean, and the share of them that is right, with its interval."""

    confidence: float
    right: Interval


def accuracy(leads: Sequence[float] | np.ndarray) -> Interval:
    """The share of leads above 0, a tie counting one half, with Wilson's 95 % interval."""
    x = np.asarray(leads)
    return wilson(float((x > 0).sum() + 0.5 * (x == 0).sum()), len(x))


def calibration(leads: Sequence[float]) -> list[Bin]:
    """The verdicts by confidence, the probability of the answer that was put first, in bins of equal count."""
    x = np.asarray(leads, dtype=np.float64)
    x = x[np.argsort(np.abs(x), kind="stable")]
    parts = np.array_split(x, max(1, min(BINS, len(x) // FEWEST)))
    return [Bin(float((1 / (1 + np.exp(-np.abs(part)))).mean()), accuracy(part)) for part in parts]


def calibration_error(bins: Sequence[Bin]) -> float:
    """The mean distance of confidence and share right (Naeini et al. 2015)."""
    n = sum(b.right.n for b in bins)
    return sum(abs(b.confidence - b.right.value) * b.right.n for b in bins) / n


def by_length(leads: Sequence[float], longer: Sequence[int]) -> dict[str, float]:
    """The accuracy where the better answer is the longer one, the shorter or neither. `longer`: by how many tokens."""
    groups: dict[str, list[float]] = {}
    for lead, more in zip(leads, longer, strict=True):
        groups.setdefault("longer" if more > 0 else "shorter" if more < 0 else "same_length", []).append(lead)
    found: dict[str, float] = {}
    for name, group in groups.items():
        found |= {f"accuracy.{name}": accuracy(group).value, f"accuracy.{name}.n": float(len(group))}
    return found


def length_only(train: Sequence[int], heldout: Sequence[int]) -> dict[str, float]:
    """What looking at lengths alone reaches: the share in which the longer answer is the better one, and the accuracy
    of the rule, take the longer or take the shorter, that does better on the training pairs."""
    share = accuracy(heldout)
    rule = share.value if accuracy(train).value >= 0.5 else 1 - share.value
    return {"length_only.longer": share.value, "length_only.accuracy": rule}


def nats(leads: Sequence[float]) -> float:
    """The mean of -log sigmoid(lead)."""
    return sum(math.log1p(math.exp(-abs(x))) + max(0.0, -x) for x in leads) / len(leads)

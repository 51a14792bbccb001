"""How sure a measured number is: the Wilson interval of a share, the bootstrap interval of a mean of differences."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z95 = 1.959963984540054  # the normal quantile at 0.975


class Interval(NamedTuple):
    """An estimate and its 95 % interval; `n` is the number of rows behind it."""

    value: float
    low: float
    high: float
    n: int


def wilson(successes: float, n: int) -> Interval:
    """The share successes / n with Wilson's 95 % score interval (Wilson, 1927), which stays inside [0, 1] and does
    not collapse at 0 or 1. `successes` may be half-integral: a tie between two answers counts one half.

    Raises ValueError when n is not positive or successes are outside [0, n].
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"wilson: {successes} successes of {n}")
    share = successes / n
    z2 = Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At 0 and at n the bounds are exactly 0 and 1; rounding must not move them.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(share, low, high, n)


def bootstrap_mean(values: Sequence[float], resamples: int, seed: int) -> Interval:
    """The mean with its 95 % percentile bootstrap interval (Efron, 1979), rows drawn with replacement.

    For two models scored on the same rows, pass the differences row by row: that is the paired bootstrap.
    Not-finite values give a NaN interval, so that a gate on it fails. Raises ValueError for no values.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        raise ValueError("bootstrap_mean: no values")
    if not np.isfinite(x).all():
        return Interval(math.nan, math.nan, math.nan, int(x.size))
    draws = np.random.default_rng(seed).integers(0, x.size, size=(resamples, x.size))
    low, high = np.quantile(x[draws].mean(axis=1), [0.025, 0.975])
    return Interval(float(x.mean()), float(low), float(high), int(x.size))

import math
import random

import pytest

from components.stats import Z95, bootstrap_mean, wilson


@pytest.mark.parametrize(("successes", "n"), [(8, 10), (1, 3), (80.5, 100), (499, 500)])
def test_wilson_bounds_solve_the_score_equation(successes, n):
    share, low, high, _ = wilson(successes, n)
    for bound in (low, high):
        # By definition the bounds are the shares p at which |observed - p| is exactly z standard errors of p.
        assert abs(share - bound) == pytest.approx(Z95 * math.sqrt(bound * (1 - bound) / n))
    assert low < share < high


def test_wilson_by_hand_and_at_the_ends():
    # 8 of 10: the interval of textbooks is 0.490 to 0.943.
    _, low, high, n = wilson(8, 10)
    assert (round(low, 3), round(high, 3), n) == (0.490, 0.943, 10)
    assert wilson(0, 10).low == 0.0 and 0.27 < wilson(0, 10).high < 0.28
    assert wilson(10, 10).high == 1.0
    for successes, rows in [(0, 0), (3, 2), (-1, 2)]:
        with pytest.raises(ValueError, match="successes"):
            wilson(successes, rows)


def test_the_bootstrap_agrees_with_a_slow_loop():
    values = [0.53, -0.22, 1.07, 0.71, 0.04, 1.98, -0.51, 0.29]
    mean, low, high, n = bootstrap_mean(values, resamples=20_000, seed=1)
    rng = random.Random(7)
    means = sorted(sum(rng.choice(values) for _ in values) / len(values) for _ in range(20_000))
    assert mean == pytest.approx(sum(values) / len(values))
    assert low == pytest.approx(means[500], abs=0.03)
    assert high == pytest.approx(means[19_500], abs=0.03)
    assert n == 8
    assert bootstrap_mean(values, 100, seed=3) == bootstrap_mean(values, 100, seed=3)


def test_the_bootstrap_of_equal_differences_has_no_width_and_of_nan_no_number():
    assert bootstrap_mean([0.5] * 4, 50, seed=0)[:3] == (0.5, 0.5, 0.5)
    assert math.isnan(bootstrap_mean([0.5, math.nan], 50, seed=0).low)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean([], 50, seed=0)

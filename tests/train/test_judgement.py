"""What is said of a reward model's verdicts, by hand."""

import math

import numpy as np
import pytest

from components.train.judgement import Bin, accuracy, by_length, calibration, calibration_error, length_only, nats


def test_accuracy_counts_a_tie_one_half() -> None:
    found = accuracy([1.0, 2.0, -1.0, 0.0])
    assert found.value == 0.625 and found.n == 4
    assert found.low == pytest.approx(0.2194, abs=1e-4) and found.high == pytest.approx(0.9081, abs=1e-4)


def test_a_calibrated_judge_has_no_error_and_a_boastful_one_has() -> None:
    """The better answer is put first with probability sigmoid(lead): drawn so, confidence and share agree."""
    rng = np.random.default_rng(0)
    size = np.abs(rng.normal(0, 2, 40_000))
    right = rng.random(40_000) < 1 / (1 + np.exp(-size))
    leads = np.where(right, size, -size)
    bins = calibration(leads.tolist())
    assert len(bins) == 10 and all(b.right.n == 4000 for b in bins)
    assert [b.confidence for b in bins] == sorted(b.confidence for b in bins) and bins[0].confidence > 0.5
    assert all(b.right.low - 0.01 < b.confidence < b.right.high + 0.01 for b in bins)
    assert calibration_error(bins) < 0.01
    assert calibration_error(calibration((5 * leads).tolist())) > 0.1
    assert accuracy((5 * leads).tolist()) == accuracy(leads.tolist())


def test_few_verdicts_make_few_bins() -> None:
    assert [b.right.n for b in calibration([1.0] * 7)] == [7]
    assert [b.right.n for b in calibration([0.5, -1.0] * 9)] == [9, 9]
    (one,) = calibration([math.log(3.0)])
    assert one == Bin(pytest.approx(0.75), accuracy([1.0]))


def test_the_error_is_the_distance_weighted_by_count() -> None:
    bins = [Bin(0.6, accuracy([1.0, -1.0])), Bin(0.9, accuracy([1.0] * 6))]
    assert calibration_error(bins) == pytest.approx((0.1 * 2 + 0.1 * 6) / 8)


def test_by_length_and_by_lengths_alone() -> None:
    leads, longer = [1.0, -1.0, 1.0, 2.0, -3.0, 1.0], [4, 2, 1, -1, -5, 0]
    found = by_length(leads, longer)
    assert found == {
        "accuracy.longer": pytest.approx(2 / 3),
        "accuracy.longer.n": 3.0,
        "accuracy.shorter": 0.5,
        "accuracy.shorter.n": 2.0,
        "accuracy.same_length": 1.0,
        "accuracy.same_length.n": 1.0,
    }
    alone = length_only([-1, -2, 3], longer)  # in training the shorter one is mostly the better
    assert alone == {"length_only.longer": pytest.approx(3.5 / 6), "length_only.accuracy": pytest.approx(2.5 / 6)}
    assert length_only([1], longer)["length_only.accuracy"] == pytest.approx(3.5 / 6)


def test_nats_of_leads() -> None:
    assert nats([0.0]) == pytest.approx(math.log(2))
    assert nats([math.log(3.0), -math.log(3.0)]) == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
    assert nats([-1e4, 1e4]) == pytest.approx(5e3)

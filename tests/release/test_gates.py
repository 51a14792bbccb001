import math

import pytest
from pydantic import ValidationError

from components.release.gates import Gate, check, judge

METRICS = {"base": 1.5, "xz": 2.0, "zero": 0.0, "nan": math.nan, "inf": math.inf}


@pytest.mark.parametrize(
    ("gate", "passed", "margin"),
    [
        ({"metric": "base", "at_most": 1.5}, True, 0.0),
        ({"metric": "base", "below": 1.5}, False, 0.0),
        ({"metric": "base", "at_least": 1.5}, True, 0.0),
        ({"metric": "base", "above": 1.5}, False, 0.0),
        ({"metric": "base", "at_most": 1.25}, False, -0.25),
        ({"metric": "base", "at_least": 1.25}, True, 0.25),
        ({"metric": "base", "below": "xz"}, True, 0.5),
        ({"metric": "xz", "below": "base"}, False, -0.5),
        ({"metric": "zero", "at_most": 0}, True, 0.0),
    ],
)
def test_a_gate_passes_and_its_margin_is_positive_when_there_is_room(gate, passed, margin):
    judged = judge(Gate(name="g", **gate), METRICS)
    assert (judged.passed, judged.margin) == (passed, margin)


@pytest.mark.parametrize(
    ("gate", "word"),
    [
        ({"metric": "absent", "at_most": 1.0}, "no metric absent"),
        ({"metric": "base", "below": "absent"}, "no metric absent"),
        ({"metric": "nan", "at_most": 1.0}, "nan is nan"),
        ({"metric": "base", "at_most": "nan"}, "nan is nan"),
        ({"metric": "inf", "at_least": 1.0}, "inf is inf"),
    ],
)
def test_a_missing_or_not_finite_metric_fails_closed_and_says_which(gate, word):
    verdict = check([Gate(name="g", **gate)], METRICS)
    assert verdict.verdict == "hold"
    assert verdict.gates[0].margin is None
    assert word in verdict.reasons[0]


def test_every_reason_is_collected():
    gates = [
        Gate(name="one", metric="base", at_most=1.0),
        Gate(name="two", metric="base", at_most=2.0),
        Gate(name="three", metric="absent", at_most=2.0),
    ]
    verdict = check(gates, METRICS)
    assert verdict.verdict == "hold"
    assert verdict.reasons == ["one: base = 1.5, not at most 1", "three: no metric absent"]
    assert check(gates[1:2], METRICS).verdict == "promote"


def test_no_gates_hold():
    assert check([], METRICS).verdict == "hold"


@pytest.mark.parametrize("limits", [{}, {"at_most": 1.0, "above": 0.0}, {"at_most": math.nan}, {"most": 1.0}])
def test_a_gate_has_exactly_one_finite_comparison(limits):
    with pytest.raises(ValidationError):
        Gate(name="g", metric="base", **limits)

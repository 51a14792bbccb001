"""Generated problems: exact numbers, canonical texts, answers that a second computation confirms."""

import re
from fractions import Fraction

import pytest

from components.data import problems
from components.data.sources import split_of


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Fraction(36), "36"),
        (Fraction(1, 2), "0.5"),
        (Fraction(-7, 4), "-1.75"),
        (Fraction(1200), "1200"),
        (Fraction(1, 1000), "0.001"),
        (Fraction(0), "0"),
    ],
)
def test_number_is_exact_and_without_trailing_zeros(value: Fraction, text: str) -> None:
    assert problems.number(value) == text


def test_a_third_has_no_decimal_text() -> None:
    with pytest.raises(ValueError, match="no finite decimal"):
        problems.number(Fraction(1, 3))


def compute(expression: str) -> Fraction:
    """A second computation: only the five shapes of expression that problems draw, by pattern."""
    n = r"(\d+(?:\.\d+)?)"
    if m := re.fullmatch(rf"{n}% (?:of|de) {n}", expression):
        return Fraction(m[1]) * Fraction(m[2]) / 100
    if m := re.fullmatch(rf"\({n} \+ {n}\) \* {n}", expression):
        return (Fraction(m[1]) + Fraction(m[2])) * Fraction(m[3])
    if m := re.fullmatch(rf"{n} \* {n} - {n}", expression):
        return Fraction(m[1]) * Fraction(m[2]) - Fraction(m[3])
    m = re.fullmatch(rf"{n} ([-+*/]) {n}", expression)
    assert m, expression
    a, b = Fraction(m[1]), Fraction(m[3])
    return {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}[m[2]]()


def test_every_result_is_right_and_restated() -> None:
    found = problems.generate(400, seed=5)
    for problem in found:
        assert problem.result == problems.number(compute(problem.expression)), problem
        assert problem.answer == f"{problem.said} = {problem.result}{problem.unit}."
    assert {p.lang for p in found} == {"en", "es"}
    assert any("%" in p.expression for p in found)
    assert any(p.unit for p in found)
    assert len({p.object for p in found}) == 400


def test_both_orders_of_a_sum_share_an_object() -> None:
    for problem in problems.generate(400, seed=2):
        if m := re.fullmatch(r"(\d+) [+*] (\d+)", problem.object):
            assert int(m[1]) <= int(m[2])


def test_the_same_seed_draws_the_same_problems() -> None:
    assert problems.generate(50, seed=1) == problems.generate(50, seed=1)
    assert problems.generate(50, seed=1) != problems.generate(50, seed=2)


def test_small_sums_are_answered_and_others_call_the_calculator() -> None:
    for problem in problems.generate(300, seed=3):
        roles = [m["role"] for m in problems.dialogue(problem)]
        if problem.direct:
            assert roles == ["user", "assistant"]
            assert max(int(n) for n in re.findall(r"\d+", problem.expression)) <= 10
        else:
            assert roles == ["user", "assistant", "tool", "assistant"]
            called = problems.dialogue(problem)[1]["tool_calls"][0]
            assert called == {"name": "calculate", "arguments": {"expression": problem.expression}}


def test_phrasings() -> None:
    assert problems.ASK["en"][0].format(e="17 * 23") == "What is 17 * 23?"
    assert problems.ASK["es"][0].format(e="15% de 240") == "¿Cuánto es 15% de 240?"


def test_splits_are_90_5_5() -> None:
    found = [split_of(f"object {i}") for i in range(20_000)]
    assert abs(found.count("train") / 20_000 - 0.90) < 0.01
    assert abs(found.count("test") / 20_000 - 0.05) < 0.01

"""The calculator against hand numbers, the generated problems' own truths, and what is no arithmetic."""

from fractions import Fraction

import pytest

from components.assistant.calculator import calculate
from components.data.problems import generate


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("17 * 23", Fraction(391)),
        ("(2 + 3) * 4 - 1", Fraction(19)),
        ("1 / 3", Fraction(1, 3)),
        ("0.1 + 0.2", Fraction(3, 10)),
        ("-(2 - 5)", Fraction(3)),
        ("2 - -3", Fraction(5)),
        ("10 - 4 - 3", Fraction(3)),
        ("15% of 240", Fraction(36)),
        ("12.5% de 80 + 1", Fraction(11)),
        (" 7 ", Fraction(7)),
    ],
)
def test_by_hand(expression: str, value: Fraction) -> None:
    assert calculate(expression) == value


def test_every_generated_problem_has_its_truth() -> None:
    for problem in generate(600, 5):
        assert calculate(problem.expression) == Fraction(problem.result), problem.expression


@pytest.mark.parametrize(
    "expression",
    [
        *("", "2 +", "1 / 0", "1 / (2 - 2)", "15 % 4", "2 ** 9", "9 // 2", "1 << 3", "x", "abs(2)", "__import__('os')"),
        *(
            "True",
            "None",
            "'1'",
            "1e9",
            "1e999999999",
            "0x10",
            "1_000",
            "1j",
            "[1]",
            "1, 2",
            "(1).real",
            "1 if 1 else 2",
        ),
        *("1 < 2", "lambda: 1", "1\n+2)", "a := 1", "٣ + 1", "not 1", "~1", "\0", "(" * 150, "1+" * 150 + "1"),
    ],
)
def test_what_is_no_arithmetic_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match=r"expression|number|division|longer"):
        calculate(expression)


def test_the_longest_expressions_are_worth_something() -> None:
    assert calculate("-" * 199 + "1") == -1
    assert calculate("1+" * 99 + "1") == 100
    assert calculate("9" * 200) == 10**200 - 1

"""Rewards by a function: what the built-in ones count as right, a user's own, and everything that one can do wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from small import GRPO, folders, prompts, train

from components.artifact import ForjaError
from components.data import problems
from components.data.problems import generate
from components.train.verify import last_number, right_answer, right_call, right_number, well_formed


def call(expression: str) -> str:
    """As answer_text shows a call."""
    said = problems.call(expression)["tool_calls"][0]
    return "<|call|>" + json.dumps(said, sort_keys=True)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7 + 3 = 10.", "10"),
        ("4 - 9 = -5.", "-5"),
        ("9-5", "5"),
        ("about 1,234.50 euros", "1234.5"),
        ("#### 72", "72"),
        ("3 km = 3000 m.", "3000"),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number(text: str, number: str | None) -> None:
    found = last_number(text)
    assert (None if found is None else float(found)) == (None if number is None else float(number))


def test_the_problems_own_answers_are_right_and_others_are_not() -> None:
    for problem in generate(300, 2):
        says = problem.answer if problem.direct else call(problem.expression)
        assert right_answer(problem.question, says, problem.result) == 1, says
        assert right_number(problem.question, problem.answer, problem.result) == 1
        assert right_call(problem.question, call(problem.expression), problem.result) == 1
        assert well_formed(problem.question, says) == 1
        assert right_answer(problem.question, says, problem.result + "1") == 0
        assert right_call(problem.question, problem.answer, problem.result) == 0


@pytest.mark.parametrize(
    "answer",
    [
        *("", "<|call|>", "<|call|>{", "<|call|>[]", '<|call|>{"name": "calculate"}', "<|call|>" + "[" * 5000),
        *('<|call|>{"name": "calculate", "arguments": {"expression": 391}}', "<|call|>391", call("17 * ")),
        *('<|call|>{"name": "other", "arguments": {"expression": "391"}}', f"It is 391. {call('391')}", call("1/0")),
    ],
)
def test_calls_that_are_none(answer: str) -> None:
    assert right_answer("What is 17 * 23?", answer, "391") == 0
    assert well_formed("What is 17 * 23?", answer) == 0


ASKED = [("val" if i % 3 == 0 else "train", f"count {i}", f"{i}") for i in range(24)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = folders(tmp_path_factory.mktemp("made"))
    (found["validate"] / "prompts.jsonl").write_text(prompts([*ASKED, ("train", "no truth")]), encoding="utf-8")
    return found


def judged(made: dict[str, Path], root: Path, code: str, **changes: Any) -> tuple[dict[str, float], Path]:
    (root / "mine.py").write_text(code, encoding="utf-8")
    return train(made, root, judge=root / "mine.py", judge_name="mine.py:mine", **changes)


@pytest.mark.parametrize("changes", [{}, GRPO], ids=["ppo", "grpo"])
def test_a_function_of_ones_own_is_learnt_from(changes: dict[str, Any], made: dict[str, Path], tmp_path: Path) -> None:
    """The shorter the better; the function sees the prompt's own words and truth."""
    code = """
def mine(prompt, answer, truth):
    assert prompt == f"count {truth}"
    return -len(answer) / 10
"""
    metrics, out = judged(made, tmp_path, code, steps=10, lr=3e-3, unfinished=-3.0, keep="best", **changes)
    assert metrics["dropped"] == metrics["dropped.truth"] == 1
    assert metrics["val_reward"] > metrics["val_reward_before"]
    first = json.loads((out / "evaluations.jsonl").read_text().splitlines()[0])["answers"][0]
    assert first["reward"] == pytest.approx(-len(first["text"]) / 10)


def test_a_default_truth_takes_every_prompt(made: dict[str, Path], tmp_path: Path) -> None:
    metrics, _ = judged(made, tmp_path, "def mine(prompt, answer, truth=None):\n    return len(answer)\n", steps=1)
    assert metrics["dropped"] == 0


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "def mine(prompt, answer, truth):\n    return float('nan')\n",
            "mine.py:mine, of the prompt 'count .*gave nan",
        ),
        ("def mine(prompt, answer, truth):\n    return 'good'\n", "gave good, which is no finite number"),
        ("def mine(prompt, answer, truth):\n    return None\n", "gave None"),
        ("def mine(prompt, answer, truth):\n    return 10 ** 400\n", "gave 1000.*which is no finite number"),
        ("def mine(prompt, answer, truth):\n    return 1 / 0\n", "of the prompt 'count .*raised ZeroDivisionError"),
        ("def other(prompt, answer, truth):\n    return 1\n", "no function mine"),
        ("mine = 3\n", "no function mine"),
        ("def mine(answer):\n    return 1\n", r"no function mine\(prompt, answer, truth\)"),
        ("import nothing_of_that_name\n", "does not load.*ModuleNotFoundError"),
        ("def mine(:\n", "does not load.*SyntaxError"),
    ],
)
def test_what_a_function_can_do_wrong(code: str, said: str, made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ForjaError, match=re.compile(said, re.DOTALL)):
        judged(made, tmp_path, code)
    assert not list((tmp_path / "out").iterdir())


def test_prompts_without_truths(made: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "validate").mkdir()
    (tmp_path / "validate" / "prompts.jsonl").write_text(prompts([("train", "a"), ("val", "b")]), encoding="utf-8")
    with pytest.raises(
        ForjaError, match=r"0 training and 0 held-out prompts fit, and 2 have no truth, which ppo\.judge"
    ):
        train(made | {"validate": tmp_path / "validate"}, tmp_path, judge_name="right_number")


def test_a_judge_of_no_such_name() -> None:
    with pytest.raises(ValueError, match=r"neither model, nor one of right_number, .* nor FILE\.py:FUNCTION"):
        train({}, Path("/nowhere"), judge_name="right_numbers")

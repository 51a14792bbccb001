"""Rewards that are known, not learnt: a Python function says what an answer is worth.

It takes three texts, `(prompt, answer, truth)`, and returns a number, the higher the better. `prompt` is what the user
said last; `answer` what the model said, a call of a tool as `<|call|>{"arguments": ..., "name": ...}`; `truth` is the
prompt's own (docs/data-format.md). Prompts without a truth are left out, unless the function has a default for it. It
has to give the same number for the same texts: a resumed run asks again.
"""

import importlib.util
import inspect
import json
import numbers
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import torch
from tokenizers import Tokenizer

from components.artifact import ForjaError
from components.assistant.calculator import calculate
from components.data.chat import answer_text
from components.data.templates import CALL
from components.train.questions import Judge, Question

MODEL = "model"  # the learnt reward, in place of a function
LARGEST = torch.finfo(torch.float32).max
Function = Callable[..., float]
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?|\d+(?:,\d{3})*(?:\.\d+)?", re.ASCII)


def right_number(prompt: str, answer: str, truth: str) -> float:
    """1 where the last number that the answer says, and no call does, is the last one of the truth, else 0."""
    said, wanted = last_number(answer), last_number(truth)
    return float(CALL not in answer and said is not None and said == wanted)


def right_call(prompt: str, answer: str, truth: str) -> float:
    """1 where the answer asks the calculator for something that is worth the truth's last number, else 0."""
    value = called(answer)
    return float(value is not None and value == last_number(truth))


def right_answer(prompt: str, answer: str, truth: str) -> float:
    """1 where the answer says the right number or calls for it, else 0."""
    return max(right_number(prompt, answer, truth), right_call(prompt, answer, truth))


def well_formed(prompt: str, answer: str, truth: str | None = None) -> float:
    """1 where the answer is a call that the calculator understands, or "... = number." with a unit or without one,
    right or wrong; else 0."""
    says = re.fullmatch(r"[^=]+ = -?\d+(\.\d+)?( \w+)?\.", answer, re.ASCII)
    return float(says is not None or called(answer) is not None)


BUILT_IN: dict[str, Function] = {f.__name__: f for f in (right_number, right_call, right_answer, well_formed)}


def last_number(text: str) -> Fraction | None:
    """The last number of a text; commas may part its thousands. None where it has none."""
    found = NUMBER.findall(text)
    return Fraction(found[-1].replace(",", "")) if found else None


def called(answer: str) -> Fraction | None:
    """What the calculator gives for the answer's call; None where it makes none, or none that has a value."""
    before, mark, call = answer.partition(CALL)
    try:
        said = json.loads(call) if mark and not before.strip() else {}
        return calculate(said["arguments"]["expression"]) if said["name"] == "calculate" else None
    except (ValueError, TypeError, KeyError, RecursionError):  # what a model may write in place of a call
        return None


def named(judge: str) -> str:
    """`judge` as the recipe has it. Raises ValueError where it is no function's name."""
    if judge != MODEL and judge not in BUILT_IN and not re.fullmatch(r".+\.py:[A-Za-z_]\w*", judge):
        raise ValueError(f"{judge!r} is neither {MODEL}, nor one of {', '.join(BUILT_IN)}, nor FILE.py:FUNCTION")
    return judge


def function_of(judge: str, path: Path | None) -> Function:
    """The function that the recipe names; `path` is where its file lies. Raises ForjaError where there is none."""
    if path is None:
        return BUILT_IN[judge]
    name = judge.rpartition(":")[2]
    spec = importlib.util.spec_from_file_location(f"judge_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ForjaError(f"ppo.judge: {path} is no Python file; name FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # somebody else's code may raise anything
        raise ForjaError(f"ppo.judge: {path} does not load ({type(e).__name__}: {e}); mend it") from e
    function = getattr(module, name, None)
    if not callable(function) or len(inspect.signature(function).parameters) != 3:
        raise ForjaError(f"ppo.judge: {path} has no function {name}(prompt, answer, truth); define it")
    return function


def needs_truth(function: Function) -> bool:
    """Whether it can say nothing of a prompt without a truth: its third parameter has no default."""
    return list(inspect.signature(function).parameters.values())[2].default is inspect.Parameter.empty


def by_function(function: Function, judge: str, tokenizer: Tokenizer) -> Judge:
    """What scores answers by `function`, of the name `judge`. Raises ForjaError, naming function and prompt, where it
    gives no number."""

    def scores(asked: Sequence[Question], answers: Sequence[list[int]]) -> torch.Tensor:
        return torch.tensor([one(q, answer_text(tokenizer, a)) for q, a in zip(asked, answers, strict=True)])

    def one(question: Question, answer: str) -> float:
        prompt = question["prompt"]
        where = f"ppo.judge: {judge}, of the prompt {prompt[:80]!r} and the answer {answer[:80]!r},"
        try:
            truth = question.get("truth")
            value = function(prompt, answer) if truth is None else function(prompt, answer, truth)
        except Exception as e:  # somebody else's code may raise anything
            raise ForjaError(f"{where} raised {type(e).__name__}: {e}; mend the function") from e
        if not isinstance(value, numbers.Real) or not abs(value) <= LARGEST:  # NaN is not either
            raise ForjaError(f"{where} gave {str(value)[:80]}, which is no finite number; mend the function")
        return float(value)

    return scores

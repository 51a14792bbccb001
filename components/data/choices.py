"""Questions with several choices, in the forms in which benchmarks are published."""

import os.path
import re
from collections.abc import Callable, Mapping
from typing import Any

from components.data.sources import hashed
from components.data.strict import Unfit

Rows = list[tuple[str, dict[str, Any]]]

ASKED = ("query", "question", "question_stem", "context", "ctx", "sentence", "input")
PASSAGES = ("article", "passage", "premise", "context", "support")
RIGHT = ("gold", "answer", "label", "answerKey", "correct", "target", "cop", "correct_option")
NUMBERED = re.compile(r"(?:(?:choice|option|opcion|ending|sol|answer)_?(\d+|[a-j])|op[a-d])", re.IGNORECASE)
WRONG = re.compile(r"(?:distractor|incorrect_answer)_?\d*s?")


def name_of(value: Mapping[str, Any]) -> str | None:
    """The name of a record with choices by its keys, or None."""
    has = value.keys()
    if "endings" in has:
        return "hellaswag"
    if ("Best Answer" in has and "Incorrect Answers" in has) or "mc1_targets" in has:
        return "truthfulqa"
    if "best_answer" in has and "incorrect_answers" in has:
        return "truthfulqa"
    if "answerKey" in has and isinstance(value.get("question"), dict):
        return "arc"
    if "context_options" in has and "continuation" in has:
        return "winogrande"
    if "goal" in has and "sol1" in has:
        return "piqa"
    if "sent_more" in has and "sent_less" in has:
        return "crows-pairs"
    if "question" in has and "correct_answer" in has and any(WRONG.fullmatch(key) for key in has):
        return "distractors"
    if has.isdisjoint(RIGHT) or has.isdisjoint(ASKED):
        return None
    if "question" in has and "passage" in has and _yes_or_no(value) is not None:
        return "boolq"
    if isinstance(value.get("choices"), dict) and "text" in value["choices"]:
        return "arc"
    if any(isinstance(value.get(key), list | dict) for key in ("choices", "options")):
        return "choices"
    if "sentence" in has and "option1" in has:
        return "winogrande"
    lettered = "A" in has and "B" in has
    return "mmlu" if lettered or sum(1 for key in has if NUMBERED.fullmatch(key)) > 1 else None


def _row(question: Any, found: Any, answer: Any) -> Rows:
    """Raises Unfit where the parts are not a question, a list of texts and the index of one of them."""
    if not isinstance(question, str):
        raise Unfit("missing field: question")
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(c, str) for c in found):
        raise Unfit("choices: a list of texts is needed")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(found):
        raise Unfit(f"answer: {answer!r} points to none of the {len(found)} choices")
    return [("eval", {"question": question, "choices": found, "answer": answer})]


def _index(value: Mapping[str, Any], found: Any, first: int = 0) -> Any:
    """The index that a record's answer means: a number, its text, a letter, or the choice itself."""
    answer = next((value[key] for key in RIGHT if key in value), None)
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, str):
        text = answer.strip()
        letter = ord(text.upper()) - ord("A") if re.fullmatch("[A-Za-z]", text) else None
        if text.isdecimal() and text.isascii():
            answer = int(text)
        elif letter is not None and isinstance(found, list) and letter < len(found):
            return letter
        elif isinstance(found, list) and found.count(answer) == 1:
            return found.index(answer)
    return answer - first if isinstance(answer, int) and not isinstance(answer, bool) else answer


def _asked(value: Mapping[str, Any]) -> Any:
    """The question; where it is about a text that stands beside it, after that and an empty line."""
    asked = next((value[key] for key in ASKED if key in value), None)
    about = next((value[key] for key in PASSAGES if isinstance(value.get(key), str) and value[key].strip()), None)
    return asked if about in (None, asked) or not isinstance(asked, str) else f"{about}\n\n{asked}"


def _yes_or_no(value: Mapping[str, Any]) -> int | None:
    """0 for no, 1 for yes: BoolQ's `answer` true or false, or SuperGLUE's `label` 0 or 1."""
    said = value["answer"] if "answer" in value else value.get("label")
    if isinstance(said, str):
        said = {"true": True, "false": False}.get(said.strip().lower())
    return int(said) if isinstance(said, bool) or ("answer" not in value and said in (0, 1)) else None


def _boolq(value: Any) -> Rows:
    value = _mapping(value)
    return _row(_asked(value), ["no", "yes"], _yes_or_no(value))


def _drawn(question: Any, right: str, wrong: list[str], key: str) -> Rows:
    """The right answer among the wrong ones, in a place drawn by hash."""
    at = hashed(f"choice/{key}") % (len(wrong) + 1)
    return _row(question, [*wrong[:at], right, *wrong[at:]], at)


def _distractors(value: Any) -> Rows:
    value = _mapping(value)
    held = [value[key] for key in value if WRONG.fullmatch(key)]
    wrong = [text for part in held for text in (part if isinstance(part, list) else [part]) if text not in (None, "")]
    question, right = value.get("question"), value.get("correct_answer")
    if not isinstance(right, str) or not isinstance(question, str):
        raise Unfit("missing field: question or correct_answer")
    return _drawn(_asked({**value, "query": question}), right, wrong, question)


def _crows_pairs(value: Any) -> Rows:
    """Two sentences that differ in a group of people. The one that says less of a stereotype counts as the answer."""
    value = _mapping(value)
    more, less, kind = value.get("sent_more"), value.get("sent_less"), value.get("bias_type")
    if not isinstance(more, str) or not isinstance(less, str):
        raise Unfit("missing field: sent_more or sent_less")
    return _drawn(kind if isinstance(kind, str) and kind.strip() else "stereotype", less, [more], more + less)


def _choices(value: Any) -> Rows:
    value = _mapping(value)
    found = value["choices"] if "choices" in value else value.get("options")
    if isinstance(found, dict):  # by their letters
        found = list(found.values())
    return _row(_asked(value), found, _index(value, found))


def _mmlu(value: Any) -> Rows:
    value = _mapping(value)
    keys = [key for key in value if NUMBERED.fullmatch(key)] or [key for key in "ABCDEFGHIJ" if key in value]
    found = [value[key] for key in keys if value[key] not in (None, "")]
    return _row(_asked(value), found, _index(value, found, first=1 if "answerA" in value else 0))


def _arc(value: Any) -> Rows:
    value = _mapping(value)
    asked, held = _asked(value), value.get("choices")
    if isinstance(asked, dict):  # as first published: a stem, and choices each with its label
        every = [c for c in asked.get("choices") or () if isinstance(c, dict)]
        asked, held = asked.get("stem"), {key: [c.get(key) for c in every] for key in ("text", "label")}
    held = held if isinstance(held, dict) else {}
    found, labels = held.get("text"), held.get("label")
    answer = next((value[key] for key in RIGHT if key in value), None)
    if isinstance(labels, list) and labels.count(answer) == 1:
        return _row(asked, found, labels.index(answer))
    raise Unfit(f"answer: {answer!r} is none of the labels")


def _hellaswag(value: Any) -> Rows:
    value = _mapping(value)
    found = value.get("endings")
    asked = value["ctx"] if "ctx" in value else _asked(value)
    return _row(asked, found, _index(value, found))


def _truthfulqa(value: Any) -> Rows:
    """Its best answer among the wrong ones, in a place drawn by hash; or its list of choices of which one is true."""
    value = _mapping(value)
    if isinstance(held := value.get("mc1_targets"), dict):
        labels = held.get("labels")
        right = labels.index(1) if isinstance(labels, list) and labels.count(1) == 1 else None
        return _row(value.get("question"), held.get("choices"), right)
    names = ("Question", "Best Answer", "Incorrect Answers")
    question, best, wrong = (value.get(key, value.get(key.lower().replace(" ", "_"))) for key in names)
    if not isinstance(question, str) or not isinstance(best, str) or not isinstance(wrong, str | list):
        raise Unfit("missing field: Question, Best Answer or Incorrect Answers")
    parts = wrong.split(";") if isinstance(wrong, str) else [text for text in wrong if isinstance(text, str)]
    found = [text for part in parts if (text := part.strip())]
    return _drawn(question, best, found, question)


def _winogrande(value: Any) -> Rows:
    """Two sentences that differ in one name: what both begin with is the question."""
    value = _mapping(value)
    if "sentence" in value:
        sentence, options = value.get("sentence"), [value.get("option1"), value.get("option2")]
        if not isinstance(sentence, str) or sentence.count("_") != 1 or not all(isinstance(o, str) for o in options):
            raise Unfit("missing field: a sentence with one _, option1 or option2")
        before, _, after = sentence.partition("_")
        return _row(before, [f"{o}{after}" for o in options], _index(value, options, first=1))
    options, after = value.get("context_options"), value.get("continuation")
    if not isinstance(options, list) or not all(isinstance(o, str) for o in options) or not isinstance(after, str):
        raise Unfit("missing field: context_options or continuation")
    same = os.path.commonprefix(options)  # noqa: RUF071  # of texts
    begin = same[: same.rfind(" ") + 1]
    return _row(begin, [f"{o[len(begin) :]} {after}" for o in options], _index(value, options))


def _piqa(value: Any) -> Rows:
    value = _mapping(value)
    found = [value.get("sol1"), value.get("sol2")]
    return _row(value.get("goal"), found, _index(value, found))


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise Unfit(f"not an object: a row is {{...}}, this is a {type(value).__name__}")
    return value


SHAPES: dict[str, Callable[[Any], Rows]] = {
    "choices": _choices,
    "mmlu": _mmlu,
    "arc": _arc,
    "hellaswag": _hellaswag,
    "truthfulqa": _truthfulqa,
    "winogrande": _winogrande,
    "piqa": _piqa,
    "boolq": _boolq,
    "distractors": _distractors,
    "crows-pairs": _crows_pairs,
}

"""The shapes in which data is published, and what each becomes in the five tables.

A shape is recognised by the keys and types of a record. `rows` gives a record's rows as (table, fields); texts are
never changed, only placed. Where a record does not fit, the reason names what is missing.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from components.data import choices, compared, dialogues
from components.data.dialogues import CHATS, LOOSE, QUESTION, turns
from components.data.names import plain
from components.data.strict import Unfit

Shape = str
Rows = list[tuple[str, dict[str, Any]]]

TEXT = ("text", "content", "document", "raw_content", "body")
ANSWERS = ("completion", "response", "continuation", "output", "solution", "canonical_solution", "answer", "target")
ALPACA = ("output", "response", "answer")
DIRECT = ("prompt", "query", "question", "instruction", "problem")
ASKED = ("prompt", "context", "query", "input", "question", "instruction", "problem")
ANSWERED = re.compile("answer|response|option|choice|distractor|winner", re.IGNORECASE)  # then it is no bare question


def name_of(value: Any) -> Shape | None:
    """The shape of one record by its keys, or None; where they have none, by their names in plain English."""
    if isinstance(value, str):
        return "text"
    return _by_keys(_readable(value)) if isinstance(value, dict) else None


def _readable(value: dict[str, Any]) -> dict[str, Any]:
    """The record, with its names in lower case and English where it has a shape only so. A question alone may have its
    answer under such a name."""
    if _by_keys(value) not in (None, "prompt"):
        return value
    same = plain(value)
    return value if _by_keys(same) is None else same


def _by_keys(value: Mapping[str, Any]) -> Shape | None:
    has = value.keys()
    if "chosen" in has and "rejected" in has:
        return dialogues.preference(value)
    if "preferred_output" in has and "non_preferred_output" in has:
        return "preference-turns"
    if compared.form_of(value):
        return "preference-compared"
    if "kto_tag" in has:
        return "kto"
    if chat := next((key for key in CHATS if _holds_turns(value, key)), None):
        if isinstance(value.get("label"), bool):
            return "kto"
        return dialogues.chat(value[chat])
    if "completion" in has and "prompt" in has and dialogues.judgement(value.get("label")) is not None:
        return "kto"
    if choice := choices.name_of(value):
        return choice
    if "instruction" in has and isinstance(value.get("instances"), list):
        return "self-instruct"
    if "instruction" in has and not has.isdisjoint(ALPACA):
        return "alpaca"
    if "question" in has and "answer" in has:
        return "pairs"
    if "question" in has and isinstance(value.get("answers"), dict | list):
        return "squad"
    if not has.isdisjoint(ASKED) and not has.isdisjoint(ANSWERS):
        return "prompt-completion"
    if any(isinstance(value.get(key), str) for key in TEXT):
        return "text"
    if has.isdisjoint(QUESTION) or any(ANSWERED.search(key) for key in has):
        return None
    return "prompt"


def _holds_turns(value: Mapping[str, Any], key: str) -> bool:
    """Whether a list is a dialogue. Under a name that may mean anything, texts are one only where nothing else is."""
    found = value.get(key)
    if not isinstance(found, list) or dialogues.chat(found) is None:
        return False
    return key not in LOOSE or isinstance(found[0], dict) or value.keys() <= {"id", key}


def detect(sample: list[Any]) -> Shape:
    """The shape of most of the records. Raises Unfit where none of them has one."""
    found = Counter(name for value in sample if (name := name_of(value)) is not None)
    if not found:
        raise Unfit(no_shape(sample[0] if sample else None))
    best = found.most_common(1)[0][0]
    return "tool-chat" if best in ("chat", "sharegpt") and "tool-chat" in found else best


def no_shape(value: Any) -> str:
    what = f"keys {', '.join(map(str, value))}"[:200] if isinstance(value, dict) else f"a {type(value).__name__}"
    return f"no known shape: {what}; name one in the recipe, or rename the fields"


def rows(shape: Shape, value: Any) -> Rows:
    """What the record becomes. Raises Unfit with the reason where it does not fit the shape."""
    try:
        return _with_truth(SHAPES[shape](value), value)
    except Unfit:
        same = _readable(value) if isinstance(value, dict) else value
        if same == value:
            raise
    return _with_truth(SHAPES[shape](same), same)


def _with_truth(found: Rows, value: Any) -> Rows:
    """A prompt keeps what the record gives as its truth, a text or a number."""
    truth = value.get("truth") if isinstance(value, dict) else None
    if isinstance(truth, bool) or not isinstance(truth, str | int | float):
        return found
    return [(table, fields | {"truth": str(truth)} if table == "prompts" else fields) for table, fields in found]


def fitted(shape: Shape, value: Any) -> tuple[Shape, Rows]:
    """What a record becomes by its file's shape; where it lacks that one's fields and has all of another's, by its own.
    A question alone is no other shape, for its answer may be what is missing; nor is a text beside such fields."""
    try:
        return shape, rows(shape, value)
    except Unfit as e:
        own = name_of(value) if isinstance(value, dict) and str(e).startswith("missing field") else None
        if own in (None, shape, "prompt") or (
            own == "text" and not value.keys().isdisjoint((*ASKED, *ANSWERS, *CHATS))
        ):
            raise
    return own, rows(own, value)


def to_table(table: str, fields: dict[str, Any], wanted: str) -> tuple[str, dict[str, Any]]:
    """A row moved to another table, where its parts allow it. Raises Unfit where they do not."""
    if table == wanted:
        return table, fields
    if wanted == "corpus":
        return wanted, {"text": _as_text(table, fields)}
    if table in ("instructions", "prompts", "preferences"):
        messages = fields["messages"]
        if wanted == "prompts" and table == "instructions":  # the answer that it had is what it can be checked by
            return wanted, {"messages": messages[:-1]} | _truth(messages[-1]["content"])
        if wanted == "prompts":
            return wanted, {"messages": messages}
        if wanted == "instructions" and "chosen" in fields:
            return wanted, {"messages": [*messages, fields["chosen"]]}
    if table == "eval" and wanted in ("instructions", "prompts"):
        asked = [{"role": "user", "content": fields["question"]}]
        right = fields["choices"][fields["answer"]]
        if wanted == "prompts":
            return wanted, {"messages": asked} | _truth(right)
        return wanted, {"messages": [*asked, {"role": "assistant", "content": right}]}
    raise Unfit(f"table: a row of {table} does not hold what {wanted} needs")


def _truth(text: str) -> dict[str, str]:
    return {"truth": text} if text.strip() else {}


def _as_text(table: str, fields: dict[str, Any]) -> str:
    if table == "eval":
        return f"{fields['question']}\n{fields['choices'][fields['answer']]}"
    said = [*fields["messages"], *([fields["chosen"]] if "chosen" in fields else [])]
    return "\n\n".join(m["content"] for m in said)


def text_of(value: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    """The first of the keys that holds text. Raises Unfit where none does."""
    for key in keys:
        if isinstance(value.get(key), str):
            return str(value[key])
    absent = [key for key in keys if key in value]
    raise Unfit(f"wrong type: {absent[0]} is no text" if absent else f"missing field: {' or '.join(keys[:3])}")


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise Unfit(f"not an object: a row is {{...}}, this is a {type(value).__name__}")
    return value


def _text(value: Any) -> Rows:
    return [("corpus", {"text": value if isinstance(value, str) else text_of(_mapping(value), TEXT)})]


def _dialogue(asked: str, answer: str, value: Mapping[str, Any]) -> Rows:
    before = dialogues.history(value.get("history"))
    messages = [*before, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    system = value["system_prompt"] if "system_prompt" in value else value.get("system")
    return [("instructions", {"messages": dialogues.with_system(system, messages)})]


def _alpaca(value: Any) -> Rows:
    value = _mapping(value)
    answer = text_of(value, ALPACA)
    return _dialogue(_asked_with_input(text_of(value, ("instruction",)), value), answer, value)


def _asked_with_input(asked: str, value: Mapping[str, Any]) -> str:
    more = value.get("input") or value.get("context")
    if more is not None and not isinstance(more, str):
        raise Unfit("wrong type: input is no text")
    return f"{asked}\n\n{more}" if more and more.strip() else asked


def _self_instruct(value: Any) -> Rows:
    value = _mapping(value)
    asked, instances = text_of(value, ("instruction",)), value.get("instances")
    if not isinstance(instances, list) or not instances:
        raise Unfit("missing field: instances")
    found: Rows = []
    for instance in map(_mapping, instances):
        found += _dialogue(_asked_with_input(asked, instance), text_of(instance, ("output",)), {})
    return found


def _completion(value: Any) -> Rows:
    value = _mapping(value)
    asked = next((value[k] for k in ASKED if isinstance(value.get(k), str | list)), None)
    answer = next((value[k] for k in ANSWERS if isinstance(value.get(k), str | list)), None)
    if isinstance(asked, list) and isinstance(answer, list):
        return dialogues.rows({"messages": [*asked, *answer]})
    before = text_of(value, ASKED)
    if any(key in value for key in DIRECT):  # then a context or an input is what that is about
        before = _asked_with_input(text_of(value, DIRECT), value)
    return _dialogue(before, text_of(value, ANSWERS), value)


def _pairs(value: Any) -> Rows:
    value = _mapping(value)
    answer = value.get("answer")
    if isinstance(answer, list) and answer:
        answer = answer[0]
    if isinstance(answer, dict):  # as TriviaQA has it
        answer = answer.get("value")
    asked = _asked_with_input(text_of(value, ("question",)), value)
    return _dialogue(asked, text_of({"answer": answer}, ("answer",)), value)


def _squad(value: Any) -> Rows:
    """A question about a text, with the first of its answers: {"text": [...]}, or [{"text": ...}, ...]."""
    value = _mapping(value)
    found = value.get("answers")
    texts = found.get("text") if isinstance(found, dict) else found
    first = texts[0] if isinstance(texts, list) and texts else None
    answer = first.get("text") if isinstance(first, dict) else first
    if not isinstance(answer, str):
        raise Unfit("answers: none is given")
    return _dialogue(_asked_with_input(text_of(value, ("question",)), value), answer, {})


def _prompt(value: Any) -> Rows:
    value = _mapping(value)
    asked = value.get("prompt")
    if isinstance(asked, list):
        return [("prompts", {"messages": turns(asked)})]
    text = _asked_with_input(text_of(value, QUESTION), value)
    return [("prompts", {"messages": dialogues.with_system(value.get("system"), [{"role": "user", "content": text}])})]


SHAPES: dict[Shape, Callable[[Any], Rows]] = {
    "text": _text,
    "alpaca": _alpaca,
    "self-instruct": _self_instruct,
    "prompt-completion": _completion,
    "pairs": _pairs,
    "squad": _squad,
    "prompt": _prompt,
    **{name: dialogues.rows for name in ("chat", "sharegpt", "tool-chat")},
    **{f"preference-{kind}": dialogues.preferences for kind in ("dialogue", "text", "turns")},
    "preference-compared": lambda value: dialogues.preferences(compared.paired(_mapping(value))),
    "kto": dialogues.kto,
    **choices.SHAPES,
}

"""Two answers to one prompt beside each other, and which is better, in the forms in which they are published."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from components.data.strict import Unfit


class Form(NamedTuple):
    """The names of the two answers, of the verdict, and whether the first is better (None: a tie) by what it says."""

    answers: tuple[str, str]
    verdict: str
    first: Mapping[Any, bool | None]


FORMS = (
    Form(("response_1", "response_2"), "preference_strength", {n: n < 0 if n else None for n in range(-3, 4)}),
    Form(("response_0", "response_1"), "better_response_id", {0: True, 1: False}),
    Form(("human_ref_A", "human_ref_B"), "labels", {1: True, 0: False}),
    Form(("response_a", "response_b"), "winner_model_a", {1: True, 0: False}),
    Form(("response_a", "response_b"), "winner", {"model_a": True, "model_b": False, "tie": None}),
)


def form_of(value: Mapping[str, Any]) -> Form | None:
    return next((f for f in FORMS if f.verdict in value and all(key in value for key in f.answers)), None)


def paired(value: Mapping[str, Any]) -> dict[str, Any]:
    """The record with `chosen` and `rejected`. Raises Unfit for a tie."""
    form = form_of(value)
    if form is None:
        raise Unfit("missing field: two responses and which is better")
    said = value[form.verdict]
    first = form.first.get(said) if isinstance(said, int | float | str) else None
    if first is None or value.get("winner_tie") == 1:
        raise Unfit(f"preference: {form.verdict} {said!r} prefers neither answer")
    better, worse = form.answers if first else form.answers[::-1]
    asked = value["history"] if "human_ref_A" in form.answers else value.get("prompt")
    return {**value, "prompt": asked, "history": None, "chosen": value[better], "rejected": value[worse]}

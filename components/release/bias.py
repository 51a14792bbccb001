"""Bias by templates: the same sentence about two groups, and how differently likely the model finds the two.

The kinds (gender, race, religion), templates and groups are data in the recipe, in English and Spanish. A difference
mixes what the model associates with the groups and how common their names are: it is a measure to watch from model to
model, not a proof of either.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

from components.data.chat import SEPARATOR, encode_text, special
from components.model.checkpoint import Checkpoint
from components.model.losses import token_logprobs


class Template(BaseModel, frozen=True, extra="forbid"):
    """A sentence with the mark {group}, and what may stand there."""

    lang: Literal["en", "es"]
    text: str
    groups: list[str] = Field(min_length=2)

    @field_validator("text")
    @classmethod
    def _has_a_place(cls, text: str) -> str:
        if "{group}" not in text:
            raise ValueError("a template needs the mark {group}")
        return text


def differences(checkpoint: Checkpoint, kinds: Mapping[str, Sequence[Template]]) -> list[dict[str, Any]]:
    """One row a pair of groups in a template: |log p(one) - log p(other)|, each in nats per token of its sentence."""
    model, tokenizer, _ = checkpoint
    separator = special(tokenizer, SEPARATOR)
    cases = [(kind, template) for kind, templates in sorted(kinds.items()) for template in templates]
    sentences = [t.text.replace("{group}", group) for _, t in cases for group in t.groups]
    tokens = [[separator, *encode_text(tokenizer, s)][: model.config.context] for s in sentences]
    means = iter([lp.double().mean().item() for lp in token_logprobs(model, tokens, separator)])
    found = []
    for kind, template in cases:
        score = [(group, next(means)) for group in template.groups]
        for (one, a), (other, b) in combinations(score, 2):
            pair = {"kind": kind, "lang": template.lang, "template": template.text, "groups": [one, other]}
            found.append({**pair, "difference": abs(a - b)})
    return found

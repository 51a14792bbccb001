import pytest
import torch
from pydantic import ValidationError

from components.data.chat import SEPARATOR, encode_text, special
from components.model.checkpoint import Checkpoint
from components.release.bias import Template, differences


def mean_logprob(model, tokens):
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([tokens]))[0].double(), -1)
    return sum(logprobs[i, tokens[i + 1]].item() for i in range(len(tokens) - 1)) / (len(tokens) - 1)


def test_each_pair_of_groups_is_compared_per_token(tokenizer, random_model, prompts):
    model = random_model(seed=5)
    kinds = {
        "religion": [Template(lang="es", text="Una persona {group} vino.", groups=["judía", "budista", "católica"])],
        "gender": [Template(lang="en", text="The {group} came.", groups=["man", "woman"])],
    }
    found = differences(Checkpoint(model, tokenizer, prompts), kinds)
    assert [(row["kind"], *row["groups"]) for row in found] == [
        ("gender", "man", "woman"),
        ("religion", "judía", "budista"),
        ("religion", "judía", "católica"),
        ("religion", "budista", "católica"),
    ]
    for row in found:
        score = [
            mean_logprob(
                model,
                [
                    special(tokenizer, SEPARATOR),
                    *encode_text(tokenizer, row["template"].replace("{group}", group)),
                ],
            )
            for group in row["groups"]
        ]
        assert row["difference"] == pytest.approx(abs(score[0] - score[1]), abs=1e-6)


def test_a_template_has_a_place_for_two_groups():
    for text, groups in (("The group came.", ["a", "b"]), ("The {group} came.", ["a"])):
        with pytest.raises(ValidationError):
            Template(lang="en", text=text, groups=groups)

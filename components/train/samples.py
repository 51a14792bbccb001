"""A few answers of the model as it stands, kept beside its weights for people to read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from components.data.chat import answer_text, encode_prompt
from components.model.generate import generate
from components.model.gpt import GPT

NEW = 64  # tokens of an answer


def write_samples(out: Path, model: GPT, tokenizer: Tokenizer, items: Sequence[dict[str, Any]], stop: int) -> None:
    """Greedy answers to `items` as out/samples.jsonl: each item's own keys with its `ids` replaced by `text`."""
    answers = generate(model, [i["ids"] for i in items], max_new_tokens=NEW, stop=stop)
    with (out / "samples.jsonl").open("w", encoding="utf-8", newline="\n") as f:
        for item, ids in zip(items, answers, strict=True):
            row = {k: v for k, v in item.items() if k != "ids"} | {"text": answer_text(tokenizer, ids)}
            f.write(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n")


def question_items(
    tokenizer: Tokenizer, rows: Sequence[dict[str, Any]], prompts: dict[str, dict[str, str]], context: int
) -> list[dict[str, Any]]:
    """Rows of instructions as items of `write_samples`: the question, its tokens, the last answer as reference.

    A question that leaves no room for an answer loses tokens at its beginning.
    """
    items = []
    for row in rows:
        question, answer = row["messages"][0], row["messages"][-1]
        ids = encode_prompt(tokenizer, [question], prompts[row["lang"]])[-max(1, context - NEW) :]
        items.append({"prompt": question["content"], "ids": ids, "reference": answer["content"]})
    return items

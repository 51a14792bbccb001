"""The prompts that a policy learns to answer, and how it answers the held-out ones as it goes on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from components.artifact import ForjaError
from components.data.chat import answer_text, encode_prompt
from components.data.tokenize import rows
from components.model.generate import generate
from components.model.gpt import GPT
from components.train.reward import score
from components.train.rl import repetition

EVALUATIONS = "evaluations.jsonl"
Question = dict[str, Any]  # "prompt" and its tokens, "ids"


def questions(tokenizer: Tokenizer, path: Path, prompts: dict, longest: int) -> tuple[dict[str, list[Question]], int]:
    """The prompts of each split, and how many are left out because they are longer than `longest` tokens.

    Raises ForjaError where none is left to learn from or none to measure by.
    """
    out: dict[str, list[Question]] = {"train": [], "val": [], "test": []}
    dropped = 0
    for row in rows(path):
        ids = encode_prompt(tokenizer, row["messages"], prompts[row["lang"]])
        if len(ids) <= longest:
            out[row["split"]].append({"prompt": row["messages"][-1]["content"], "ids": ids})
        else:
            dropped += 1
    if not out["train"] or not out["val"]:
        raise ForjaError(
            f"{path}: {len(out['train'])} training and {len(out['val'])} held-out prompts fit, and {dropped} are "
            f"longer than the {longest} tokens that max_new_tokens leaves of the context; lower it, or add prompts"
        )
    return out, dropped


def evaluated(
    model: GPT, reward: GPT, heldout: Sequence[Question], marks: tuple[int, int], new: int, few: int
) -> dict[str, Any]:
    """Greedy answers of up to `new` tokens: their mean reward and repetition, and the first `few` with their own."""
    pad, end = marks
    asked = [row["ids"] for row in heldout]
    answers = generate(model, asked, max_new_tokens=new, stop=end)
    scores = sound(score(reward, [p + a for p, a in zip(asked, answers, strict=True)], pad))
    measured = {"reward": float(scores.mean()), "repetition": repetition(answers)}
    return measured | {"answers": answers[:few], "scores": scores[:few].tolist()}


def sound(scores: Tensor) -> Tensor:
    """The scores as they are. Raises ForjaError where one is no number."""
    if wrong := int((~torch.isfinite(scores)).sum()):
        raise ForjaError(
            f"artifacts/reward: the reward of {wrong} of {len(scores)} answers is NaN or infinite; "
            "train the reward model again, with a lower lr"
        )
    return scores


def write_evaluations(
    out: Path, found: Sequence[dict[str, Any]], heldout: Sequence[Question], tokenizer: Tokenizer
) -> None:
    """What the model answered at each evaluation, side by side: a row a prompt."""
    with (out / EVALUATIONS).open("w", encoding="utf-8", newline="\n") as f:
        for i in range(len(found[0]["answers"])):
            answers = [
                {"step": e["step"], "reward": e["scores"][i], "text": answer_text(tokenizer, e["answers"][i])}
                for e in found
            ]
            row = {"prompt": heldout[i]["prompt"], "answers": answers}
            f.write(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n")

"""The prompts that a policy learns to answer, and how it answers the held-out ones as it goes on."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
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
Question = dict[str, Any]  # "prompt" and its tokens, "ids"; "truth" where it has one
Judge = Callable[[Sequence[Question], Sequence[list[int]]], Tensor]  # the score [N] of an answer to each question


def questions(
    tokenizer: Tokenizer, path: Path, prompts: dict, longest: int, truth: bool = False
) -> tuple[dict[str, list[Question]], Counter[str]]:
    """The prompts of each split, and how many are left out for what: `long`er than `longest` tokens, or without a
    `truth` where that is wanted.

    Raises ForjaError where none is left to learn from or none to measure by.
    """
    out: dict[str, list[Question]] = {"train": [], "val": [], "test": []}
    dropped: Counter[str] = Counter()
    for row in rows(path):
        ids = encode_prompt(tokenizer, row["messages"], prompts[row["lang"]])
        if truth and "truth" not in row:
            dropped["truth"] += 1
        elif len(ids) > longest:
            dropped["long"] += 1
        else:
            known = {"truth": row["truth"]} if "truth" in row else {}
            out[row["split"]].append({"prompt": row["messages"][-1]["content"], "ids": ids} | known)
    if not out["train"] or not out["val"]:
        untold = f", and {dropped['truth']} have no truth, which ppo.judge needs" if truth else ""
        raise ForjaError(
            f"{path}: {len(out['train'])} training and {len(out['val'])} held-out prompts fit{untold}, and "
            f"{dropped['long']} are longer than the {longest} tokens that max_new_tokens leaves of the context; "
            "lower it, or add prompts"
        )
    return out, dropped


def evaluated(model: GPT, judge: Judge, heldout: Sequence[Question], end: int, new: int, few: int) -> dict[str, Any]:
    """Greedy answers of up to `new` tokens: their mean reward and repetition, and the first `few` with their own."""
    answers = generate(model, [row["ids"] for row in heldout], max_new_tokens=new, stop=end)
    scores = judge(heldout, answers)
    measured = {"reward": float(scores.mean()), "repetition": repetition(answers)}
    return measured | {"answers": answers[:few], "scores": scores[:few].tolist()}


def said_of(evaluation: dict[str, Any]) -> dict[str, float]:
    """What an evaluation adds to the curves."""
    return {f"val_{key}": value for key, value in evaluation.items() if isinstance(value, float)}


def by_model(reward: GPT, pad: int) -> Judge:
    """The reward model's verdict."""
    return lambda asked, answers: sound(
        score(reward, [q["ids"] + list(a) for q, a in zip(asked, answers, strict=True)], pad)
    )


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

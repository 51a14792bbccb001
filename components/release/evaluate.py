"""Evaluate: everything that a promotion rests on, measured on the test split alone, and the gates judged.

Shares carry Wilson's 95 % interval, means a bootstrap's. A part without test rows yields no metric, and a gate on a
missing metric does not pass. rows.jsonl keeps the rows behind the numbers.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from components.artifact import to_json
from components.data.chat import SEPARATOR, answer_text, encode_prompt, special
from components.data.clean import contaminated
from components.data.templates import stop
from components.data.tokenize import rows as read_rows
from components.log import Log
from components.model.checkpoint import WEIGHTS, Checkpoint
from components.model.generate import generate
from components.model.losses import text_bits_per_byte
from components.release.bias import Template, differences
from components.release.gates import Gate, check
from components.release.likelihood import choice_scores, sequence_kl, xz_bits_per_byte
from components.release.quality import ROUGE, bleu, rouge
from components.release.quantize import load
from components.stats import Interval, bootstrap_mean, wilson
from components.train.reward import Pair, items_of, score

Row = dict[str, Any]
Found = tuple[dict[str, float], list[Row]]  # metrics, and the rows behind them


class Config(BaseModel, frozen=True, extra="forbid"):
    seed: int
    choice_rows: int = Field(ge=1)  # the most test rows each part takes, chosen by a hash of their id
    quality_rows: int = Field(ge=1)
    preference_rows: int = Field(ge=1)
    prompt_rows: int = Field(ge=1)
    answers: int = Field(ge=1)  # sampled to each prompt: their mean is what the models are compared by
    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(gt=0)  # of those answers; 1 is the models' own distribution
    bootstrap: int = Field(ge=100)  # resamples
    bias: dict[str, list[Template]]
    gates: list[Gate]


def run(
    cfg: Config,
    validate: Path,
    tokenize: Path,
    pretrain: Path,
    sft: Path,
    reward: Path,
    referee: Path,
    ppo: Path,
    quantize: Path,
    out: Path,
    log: Log,
) -> dict[str, float]:
    base, tuned, policy = load(pretrain), load(sft), load(ppo)
    scorers = {"reward": load(reward), "referee": load(referee)}  # what PPO learnt from, and what it never saw
    asked = base._replace(prompts=policy.prompts)  # the base model has no templates of its own
    small = {"int8": quantize / "int8", "int4": quantize / "int4"}
    parts: list[Callable[[], Found]] = [
        lambda: compression({"pretrain": base, "sft": tuned, "ppo": policy}, tokenize),
        lambda: compression({name: load(folder) for name, folder in small.items()}, tokenize),
        lambda: sizes(small, ppo),
        lambda: choices(cfg, {"pretrain.choice": base, "choice": policy}, policy.prompts, validate),
        lambda: quality(cfg, {"pretrain": asked, "sft": tuned, "ppo": policy}, validate),
        lambda: bias(cfg, policy),
        lambda: preferences(cfg, scorers, validate),
        lambda: gain(cfg, policy, tuned, scorers, validate),
        lambda: contamination(validate),
    ]
    metrics: dict[str, float] = {}
    kept: list[Row] = []
    for step, part in enumerate(parts):
        found, rows = part()
        metrics |= found
        kept += rows
        log({**finite(found), "progress": (step + 1) / len(parts)}, step)
    for name in small:
        metrics[f"{name}.bits_per_byte_ratio"] = metrics[f"{name}.bits_per_byte"] / metrics["ppo.bits_per_byte"]

    verdict = check(cfg.gates, metrics)
    (out / "gates.json").write_text(to_json(verdict.model_dump()), encoding="utf-8")
    with (out / "rows.jsonl").open("w", encoding="utf-8", newline="") as f:
        f.writelines(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in kept)
    return finite(metrics)


def compression(models: dict[str, Checkpoint], tokenize: Path) -> Found:
    """Bits per byte of the whole test text, by each model and by xz -9."""
    text = (tokenize / "test.txt").read_bytes()
    documents = np.load(tokenize / "test.npy").tolist()
    metrics = {"xz.bits_per_byte": xz_bits_per_byte(text)}
    for name, (model, tokenizer, _) in models.items():
        separator = special(tokenizer, SEPARATOR)
        metrics[f"{name}.bits_per_byte"] = text_bits_per_byte(model, documents, len(text), separator)
    return metrics, []


def sizes(small: dict[str, Path], full: Path) -> Found:
    """The bytes of each quantized model's file against those of the full model's."""
    whole = (full / WEIGHTS).stat().st_size
    return {f"{name}.bytes_ratio": (folder / WEIGHTS).stat().st_size / whole for name, folder in small.items()}, []


def choices(cfg: Config, models: dict[str, Checkpoint], prompts: dict[str, Any], validate: Path) -> Found:
    """Four-choice accuracy: right when the right choice alone has the highest log-likelihood per byte."""
    metrics: dict[str, float] = {}
    table = pick(validate / "eval.jsonl", cfg.choice_rows)
    kept: list[Row] = [{"part": "choice", "id": row["id"], "answer": row["answer"]} for row in table]
    for name, checkpoint in models.items() if table else ():
        scores = choice_scores(checkpoint, table, prompts)
        right = sum(is_right(found, row["answer"]) for found, row in zip(scores, table, strict=True))
        metrics |= interval(name, wilson(right, len(table)), value=f"{name}.accuracy")
        for row, found in zip(kept, scores, strict=True):
            row[name] = [round(x, 6) for x in found]
    return metrics, kept


def quality(cfg: Config, models: dict[str, Checkpoint], validate: Path) -> Found:
    """ROUGE and BLEU of greedy answers to instructions whose answer is one plain message."""
    table = pick(validate / "instructions.jsonl", cfg.quality_rows, _plain)
    metrics: dict[str, float] = {}
    references = [row["messages"][1]["content"] for row in table]
    kept: list[Row] = [
        {"part": "quality", "id": row["id"], "prompt": row["messages"][0]["content"], "reference": reference}
        for row, reference in zip(table, references, strict=True)
    ]
    for name, checkpoint in models.items() if table else ():
        asked = [to_prompt(cfg, checkpoint, row["messages"][:1], row["lang"]) for row in table]
        texts = [answer_text(checkpoint.tokenizer, ids) for ids in answer(cfg, checkpoint, asked, temperature=0.0)]
        scores = rouge(texts, references)
        metrics |= {f"{name}.{kind}": sum(s[kind] for s in scores) / len(scores) for kind in ROUGE}
        metrics[f"{name}.bleu"] = bleu(texts, references)
        for row, text, found in zip(kept, texts, scores, strict=True):
            row |= {name: text, f"{name}.rougeL": round(found["rougeL"], 6)}
    return metrics | ({"quality.n": float(len(table))} if table else {}), kept


def bias(cfg: Config, checkpoint: Checkpoint) -> Found:
    """Mean, largest and standard deviation of the groups' differences, over all templates and by kind."""
    kept = differences(checkpoint, cfg.bias)
    metrics: dict[str, float] = {}
    for kind in ["", *sorted(cfg.bias)]:
        name = f"bias.{kind}" if kind else "bias"
        values = [row["difference"] for row in kept if kind in ("", row["kind"])]
        if values:
            metrics |= interval(name, bootstrap_mean(values, cfg.bootstrap, cfg.seed), value=f"{name}.mean")
            metrics |= {f"{name}.max": max(values), f"{name}.std": float(np.std(values))}
    return metrics, [{"part": "bias", **row, "difference": round(row["difference"], 6)} for row in kept]


def preferences(cfg: Config, scorers: dict[str, Checkpoint], validate: Path) -> Found:
    """How often each reward model scores the chosen answer of a held-out pair higher. A tie counts one half: it says
    no more than a coin."""
    one = scorers["reward"]  # both have SFT's tokenizer, templates and context
    kept: list[Row] = []
    sequences: list[list[int]] = []
    for row in pick(validate / "preferences.jsonl", cfg.preference_rows):
        found, _ = items_of(one.tokenizer, [row], one.prompts, one.model.config.context, long="cut")
        if found and isinstance(found[0], Pair):
            sequences += found[0][:2]
            kept.append({"part": "preference", "id": row["id"], "kind": row["kind"]})
    metrics: dict[str, float] = {}
    for name, scorer in scorers.items() if kept else ():
        values = score(scorer.model, sequences, special(scorer.tokenizer, SEPARATOR)).tolist()
        right = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(values[::2], values[1::2], strict=True)]
        metrics |= interval(name, wilson(sum(right), len(right)), value=f"{name}.accuracy")
        for kind in sorted({row["kind"] for row in kept}):
            some = [x for x, row in zip(right, kept, strict=True) if row["kind"] == kind]
            metrics[f"{name}.accuracy.{kind}"] = sum(some) / len(some)
        for row, better, worse, r in zip(kept, values[::2], values[1::2], right, strict=True):
            under = "" if name == "reward" else f"{name}."
            row.update({f"{under}chosen": round(better, 6), f"{under}rejected": round(worse, 6), f"{under}right": r})
    return metrics, kept


def gain(cfg: Config, policy: Checkpoint, tuned: Checkpoint, scorers: dict[str, Checkpoint], validate: Path) -> Found:
    """PPO against SFT on the test prompts: both give cfg.answers answers with the same seeds, both reward models score
    them, and the differences of their means are bootstrapped by prompt: `gain` by the model that PPO learnt from,
    `referee_gain` by the one that it did not. How far the two agree is the correlation of their scores. And the KL of
    PPO's answers to SFT, in nats a sequence. The rows keep the first answer of each, with the means."""
    table = pick(validate / "prompts.jsonl", cfg.prompt_rows)
    if not table:
        return {}, []
    separator = special(policy.tokenizer, SEPARATOR)
    asked = [to_prompt(cfg, policy, row["messages"], row["lang"]) for row in table] * cfg.answers
    answers = {n: answer(cfg, c, asked, cfg.temperature) for n, c in (("ppo", policy), ("sft", tuned))}
    whole = [p + a for said in answers.values() for p, a in zip(asked, said, strict=True)]
    scores = {name: score(scorer.model, whole, separator) for name, scorer in scorers.items()}
    rewards = {
        f"{name}.{'reward' if by == 'reward' else 'referee_reward'}": by_prompt(values, len(table))
        for by, both in scores.items()
        for name, values in zip(answers, both.chunk(2), strict=True)
    }
    drift = by_prompt(sequence_kl(policy.model, tuned.model, asked, answers["ppo"], separator), len(table))
    metrics = interval("ppo.kl", bootstrap_mean(drift, cfg.bootstrap, cfg.seed), value="ppo.kl")
    for name, by in (("ppo.gain", "reward"), ("ppo.referee_gain", "referee_reward")):
        won = [ours - theirs for ours, theirs in zip(rewards[f"ppo.{by}"], rewards[f"sft.{by}"], strict=True)]
        metrics |= interval(name, bootstrap_mean(won, cfg.bootstrap, cfg.seed), value=name)
    metrics["referee.correlation"] = float(torch.corrcoef(torch.stack([*scores.values()]).double())[0, 1])
    metrics |= {name: sum(values) / len(values) for name, values in rewards.items()}
    end = stop(policy.tokenizer, policy.prompts)
    for name, said in answers.items():
        metrics[f"{name}.unfinished"] = sum(ids[-1] != end for ids in said) / len(asked)
        metrics[f"{name}.length"] = sum(map(len, said)) / len(asked)
    kept: list[Row] = []
    for i, row in enumerate(table):
        texts = {name: answer_text(policy.tokenizer, said[i]) for name, said in answers.items()}
        means = {name: round(values[i], 6) for name, values in rewards.items()}
        prompt = row["messages"][-1]["content"]
        kept.append({"part": "gain", "id": row["id"], "prompt": prompt, "kl": round(drift[i], 6), **texts, **means})
    return metrics, kept


def by_prompt(values: Sequence[float] | Tensor, prompts: int) -> list[float]:
    """The mean over each prompt's answers, where `values` runs through all prompts once an answer."""
    means: list[float] = torch.as_tensor(values).view(-1, prompts).mean(0).tolist()
    return means


def contamination(validate: Path) -> Found:
    """The rows that stages train on and that hold words of an eval row or of a test row, counted anew: none should."""
    kept: list[Row] = [{"part": "contamination", **found} for found in contaminated(validate)]
    return {"contamination.rows": float(len(kept))}, kept


def is_right(scores: Sequence[float], answer: int) -> bool:
    """Whether the right choice alone has the highest score; NaN is wrong."""
    return all(scores[answer] > other for i, other in enumerate(scores) if i != answer)


def _plain(row: Row) -> bool:
    return len(row["messages"]) == 2 and not row["messages"][1].get("tool_calls")


def pick(table: Path, most: int, fits: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """At most `most` rows of the table's test split: those whose ids hash lowest, a sample that no order biases."""
    found = [row for row in read_rows(table) if row["split"] == "test" and fits(row)]
    return sorted(found, key=lambda row: hashlib.sha256(row["id"].encode()).digest())[:most]


def to_prompt(cfg: Config, checkpoint: Checkpoint, messages: Sequence[Row], lang: str) -> list[int]:
    """The dialogue's tokens; one that would leave no room for the answer loses tokens at its beginning."""
    room = max(1, checkpoint.model.config.context - cfg.max_new_tokens)
    return encode_prompt(checkpoint.tokenizer, messages, checkpoint.prompts[lang])[-room:]


def answer(cfg: Config, checkpoint: Checkpoint, asked: list[list[int]], temperature: float) -> list[list[int]]:
    end = stop(checkpoint.tokenizer, checkpoint.prompts)
    return generate(
        checkpoint.model, asked, max_new_tokens=cfg.max_new_tokens, stop=end, temperature=temperature, seed=cfg.seed
    )


def interval(name: str, found: Interval, value: str) -> dict[str, float]:
    """An interval as metrics: the estimate under `value`, and name.low, name.high, name.n."""
    return {value: found.value, f"{name}.low": found.low, f"{name}.high": found.high, f"{name}.n": float(found.n)}


def finite(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}

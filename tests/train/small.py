"""What PPO reads, made in a second without training: a tokenizer, a policy and a reward model with random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from components.data import tokenize
from components.data.chat import END
from components.log import silent
from components.model.checkpoint import save
from components.model.gpt import GPT, GPTConfig
from components.train import ppo
from components.train.reward import with_scalar_head

SHAPE = {
    **{"context": 64, "layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "head_width": 8, "mlp_width": 32},
    **{"block": "pre", "norm": "rms", "norm_eps": 1e-5, "positions": "rotary", "rope_theta": 1e4},
    **{"rope_scaling": None, "activation": "gelu", "window": None, "qk_norm": True, "bias": "none", "tied": True},
    **{"logit_cap": None, "smear": False, "residual_init": "scaled"},
}
TEMPLATES = {"en": {"user": "Q: {content}\n", "assistant": "A:"}}
RECIPE = ppo.Config(
    **{"algorithm": "ppo", "judge": "model", "lora": None, "group": 1, "sampler": "forja"},
    **{"lr": 3e-4, "matrix_lr": None, "schedule": "wsd", "lr_floor": 0.1, "warmup": 0, "decay": 0.5},
    **{"weight_decay": 0.0, "beta2": 0.95, "clip": 1.0, "ema": None, "precision": "fp32"},
    **{"seed": 3, "steps": 4, "batch": 8, "eval_every": 2, "save_every": 2, "keep": "last"},
    **{"minibatches": 2, "epochs": 2, "max_new_tokens": 8, "temperature": 1.0, "value_lr": 3e-4, "value_first": 1},
    **{"gamma": 1.0, "lam": 0.95, "clip_ratio": 0.2, "clip_value": 0.2, "unfinished": -1.0},
    **{"beta": 0.1, "desirable": 1.0, "undesirable": 1.0, "long": "cut", "val_pairs": 8},
    **{"kl_estimator": "k1", "kl_coef": 0.1, "kl_target": 1.0, "kl_budget": None, "val_rows": 4, "sample_rows": 2},
)


def prompts(texts: list[tuple[str, ...]]) -> str:
    """prompts.jsonl of (split, question), or (split, question, truth)."""
    rows = (
        {"id": str(i), "lang": "en", "split": split, "messages": [{"role": "user", "content": text}]}
        | ({"truth": truth[0]} if truth else {})
        for i, (split, text, *truth) in enumerate(texts)
    )
    return "".join(json.dumps(row) + "\n" for row in rows)


def folders(root: Path) -> dict[str, Path]:
    """The folders `validate`, `sft` and `reward` under `root`."""
    made = {name: root / name for name in ("validate", "tokenize", "sft", "reward")}
    for folder in made.values():
        folder.mkdir(parents=True)
    words = ["some", "words", "to", "count", "and", "to", "learn", "from"]
    texts = [" ".join(words[(i * k) % len(words)] for k in range(1, 9)) + f" {i}" for i in range(40)]
    common = [{"id": str(i), "lang": "en", "split": ("train", "val", "test")[i % 3]} for i in range(40)]
    corpus = "".join(json.dumps(c | {"text": t}) + "\n" for c, t in zip(common, texts, strict=True))
    (made["validate"] / "corpus.jsonl").write_text(corpus, encoding="utf-8")
    for table in ("instructions", "preferences"):
        (made["validate"] / f"{table}.jsonl").write_text("", encoding="utf-8")
    asked = [("val" if i % 3 == 0 else "train", "count " * (1 + i % 4) + str(i)) for i in range(24)]
    (made["validate"] / "prompts.jsonl").write_text(prompts(asked), encoding="utf-8")
    learnt = tokenize.Config(vocab_size=290, min_frequency=1, sample_mb=9, tokenizer=None)
    tokenize.run(learnt, made["validate"], made["tokenize"], silent)
    tokenizer = made["tokenize"] / "tokenizer.json"
    vocabulary = max(json.loads(tokenizer.read_bytes())["model"]["vocab"].values()) + 1
    torch.manual_seed(7)
    policy = GPT(GPTConfig(**SHAPE | {"vocab_size": vocabulary, "head": "lm"}))
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(3.0)  # far enough from uniform to have likely tokens
        policy.wte.weight[Tokenizer.from_file(str(tokenizer)).token_to_id(END)] *= 8  # some answers end by themselves
    judge = with_scalar_head(policy)
    torch.nn.init.normal_(judge.head.weight, std=0.5)
    save(policy, made["sft"], tokenizer, TEMPLATES)
    save(judge, made["reward"], tokenizer, TEMPLATES)
    return made


# What GRPO's recipe says otherwise.
GRPO = {"algorithm": "grpo", "kl_estimator": "k3", "batch": 4, "group": 4}


def train(
    made: dict[str, Path],
    root: Path,
    log: Any = silent,
    judge: Path | None = None,
    judge_name: str = "model",
    **changes: Any,
) -> tuple[dict[str, float], Path]:
    """The metrics and the folder of one PPO by RECIPE with `changes`; `judge` is the file of the function that judges,
    where `judge_name` is in one."""
    cfg = ppo.Config.model_validate(RECIPE.model_dump() | {"judge": judge_name} | changes)
    out, scratch = root / "out", root / "scratch"
    out.mkdir(parents=True)
    scratch.mkdir(exist_ok=True)
    return ppo.run(cfg, made["validate"], made["sft"], made["reward"], out, scratch, log, judge), out

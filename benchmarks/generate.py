"""Tokens a second of generation on the CPU, against transformers' `generate` with the same weights.

    python benchmarks/generate.py [--smoke] [--seconds 20] [--only 10m-1 124m-8 recompute-256 ...]

Greedy, from 32 tokens of prompt, no stop. Contenders take one whole call each, round by round in one process, and each
is compared at its fastest tenth:
  forja       generate with a Decoder, in fp32 and in bf16; at batch 1 with `alone`
  theirs      GPT2LMHeadModel.generate, in fp32 and in bf16, each with its dynamic and its static cache
  recompute   forja's model over the whole text for every token, 0.8M parameters: one text up to 256 tokens, and a
              batch of 256 up to 128
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.rounds import fastest, say

PROMPT = 32
SHAPES = {
    "10m": {"context": 256, "layers": 6, "width": 384, "heads": 6, "vocab": 4096},
    "124m": {"context": 1024, "layers": 12, "width": 768, "heads": 12, "vocab": 50257},
    "0.8m": {"context": 256, "layers": 4, "width": 128, "heads": 4, "vocab": 65},
    "tiny": {"context": 64, "layers": 2, "width": 64, "heads": 2, "vocab": 100},
}
NEW = {1: 64, 8: 64, 64: 32, 256: 16}  # tokens of an answer by batch: whole calls must stay short enough for rounds
CASES = [f"{shape}-{batch}" for shape in ("10m", "124m") for batch in NEW] + ["recompute-1", "recompute-256"]


def models(name: str) -> tuple[Any, Any]:
    """transformers' GPT-2 of random weights, and forja's model with the same."""
    import torch
    import yaml
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    from components.model.gpt import GPT, GPTConfig

    logging.set_verbosity_error()
    s = SHAPES[name]
    torch.manual_seed(0)
    names = {"n_positions": s["context"], "n_embd": s["width"], "n_layer": s["layers"], "n_head": s["heads"]}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=s["vocab"], **names, **ends)).eval()
    preset = yaml.safe_load(Path("conf/models/gpt.yaml").read_text(encoding="utf-8"))
    shape = {k: s[k] for k in ("context", "layers", "width", "heads")} | {"kv_heads": s["heads"]}
    shape |= {"head_width": s["width"] // s["heads"], "mlp_width": 4 * s["width"]}
    ours = GPT(GPTConfig(**preset | shape, vocab_size=s["vocab"], head="lm")).eval()
    state = {k.removeprefix("transformer."): v for k, v in theirs.state_dict().items()}
    parts = {"ln_1": "norm1", "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.out", "ln_2": "norm2"}
    parts |= {"mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}
    mapped = {k: state[k] for k in ("wte.weight", "wpe.weight")} | {"head.weight": state["wte.weight"]}
    mapped |= {f"norm.{p}": state[f"ln_f.{p}"] for p in ("weight", "bias")}
    for layer in range(s["layers"]):
        for a, b in parts.items():
            for p in ("weight", "bias"):
                tensor = state[f"h.{layer}.{a}.{p}"]
                mapped[f"blocks.{layer}.{b}.{p}"] = tensor.T if p == "weight" and "ln" not in a else tensor
    ours.load_state_dict(mapped)
    return theirs, ours


def rounds(contenders: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Each contender's seconds a call, in turns, after one call that warms up."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(taken.values()))) < 2:
        for name, call in contenders.items():
            started = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - started)
    return taken


def bandwidth(seconds: float) -> float:
    """Bytes a second of reading 1 GB: the sum of a float32 buffer, fastest of several."""
    import torch

    buffer = torch.ones(1 << 28)
    return buffer.nbytes / fastest(rounds({"sum": buffer.sum}, seconds)["sum"])


def against_transformers(name: str, batch: int, new: int, seconds: float) -> dict[str, Any]:
    import torch

    from components.model.decode import Decoder
    from components.model.generate import generate

    theirs, ours = models(name)
    ids = torch.randint(1, SHAPES[name]["vocab"], (batch, PROMPT))
    prompts = ids.tolist()
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    started = time.perf_counter()
    decoders = {k: Decoder(ours, dtype, alone=batch == 1) for k, dtype in types.items()}
    prepared = time.perf_counter() - started
    peers = {"fp32": theirs, "bf16": models(name)[0].bfloat16()}
    contenders: dict[str, Callable[[], Any]] = {}
    for k in types:
        contenders[f"forja {k}"] = lambda k=k: generate(decoders[k], prompts, max_new_tokens=new, stop=-1)
        for cache in ("dynamic", "static"):
            more = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
            asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False, **more}
            contenders[f"{k} {cache}"] = lambda k=k, asked=asked: peers[k].generate(ids, **asked)
    ours_said, theirs_said = contenders["forja fp32"](), contenders["fp32 dynamic"]()[:, PROMPT:].tolist()
    same = sum(a == b for x, y in zip(ours_said, theirs_said, strict=True) for a, b in zip(x, y, strict=True))
    best = {k: fastest(v) for k, v in rounds(contenders, seconds).items()}
    rate = {k: batch * new / v for k, v in best.items()}
    peer = {k: max(rate[f"{k} dynamic"], rate[f"{k} static"]) for k in types}
    row = {
        "tokens_per_s": {k: round(v, 1) for k, v in rate.items()},
        "ratio": rate["forja bf16"] / max(peer.values()),
        "ratio_to_fp32": rate["forja bf16"] / peer["fp32"],
        "ratio_fp32": rate["forja fp32"] / peer["fp32"],
        "same_tokens": same / (batch * new),
        "prepare_s": prepared,
    }
    if batch == 1:
        # A call of 1 token reads the prompt: what the others take on top is reading weights and cache.
        first = {k: lambda k=k: generate(decoders[k], prompts, max_new_tokens=1, stop=-1) for k in types}
        prompt = {k: fastest(v) for k, v in rounds(first, min(2, seconds)).items()}
        weights = sum(p.numel() for n, p in ours.named_parameters() if n != "wpe.weight")
        cache = 2 * SHAPES[name]["layers"] * SHAPES[name]["width"] * (PROMPT + new / 2)
        there = bandwidth(min(2, seconds))
        for k, dtype in types.items():
            step = (best[f"forja {k}"] - prompt[k]) / (new - 1)
            row[f"share_of_bandwidth_{k}"] = (weights + cache) * dtype.itemsize / step / there
        row["read_gb_per_s"] = there / 1e9
    return row


def against_recomputation(name: str, batch: int, new: int, seconds: float) -> dict[str, Any]:
    """`new` tokens behind 4, with a cache and without, both in float32."""
    import torch

    from components.model.generate import generate

    _, model = models(name)
    prompt = torch.randint(1, SHAPES[name]["vocab"], (batch, 4))

    @torch.inference_mode()
    def without() -> list[list[int]]:
        ids = prompt
        for _ in range(new):
            ids = torch.cat((ids, model.logits(model.hidden(ids)[:, -1]).argmax(-1, keepdim=True)), dim=1)
        return ids[:, 4:].tolist()

    def cached() -> list[list[int]]:
        return generate(model, prompt.tolist(), max_new_tokens=new, stop=-1, alone=batch == 1)

    best = {k: fastest(v) for k, v in rounds({"forja": cached, "recompute": without}, seconds).items()}
    rate = {k: batch * new / v for k, v in best.items()}
    row = {"tokens_per_s": rate, "ratio": rate["forja"] / rate["recompute"], "same_tokens": cached() == without()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--only", nargs="*", default=CASES)
    asked = parser.parse_args()
    rows: dict[str, Any] = {}
    for case in ["tiny-1", "recompute-2"] if asked.smoke else asked.only:
        name, _, batch = case.partition("-")
        seconds = 0.1 if asked.smoke else asked.seconds
        if name == "recompute":
            shape, new = ("tiny", 20) if asked.smoke else ("0.8m", 252 if batch == "1" else 124)
            rows[case] = against_recomputation(shape, int(batch), new, seconds)
        else:
            rows[case] = against_transformers(name, int(batch), 8 if asked.smoke else NEW[int(batch)], seconds)
        say(f"{case}: {json.dumps(rows[case])}")
    ratios = [row["ratio"] for case, row in rows.items() if "recompute" not in case]
    print(json.dumps({"benchmark": "generate", "smoke": asked.smoke, "ratio": min(ratios, default=None), **rows}))


if __name__ == "__main__":
    main()
